"""EPIC: a model that teaches itself to live with fewer visual tokens, in one forward pass."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokencurric.adapters.adapter import ModelAdapter
from tokencurric.adapters.attachment import Attachment
from tokencurric.adapters.compiled import refuse_compiled_twice, renew, runs_compiled
from tokencurric.adapters.compress import check_layer, seam_of
from tokencurric.adapters.counted import (
    counted_states,
    kept_predictors,
    padding_shares,
    reachable_targets,
    selection_of,
    visual_tokens,
)
from tokencurric.adapters.discovery import ModelParts
from tokencurric.adapters.layout import Layout, lay_out
from tokencurric.adapters.record import Record, Request
from tokencurric.adapters.seam import Call, Seam
from tokencurric.adapters.sharding import gathered
from tokencurric.compressors import Compressor, require_compressor
from tokencurric.curriculum import Curriculum, Stage
from tokencurric.errors import RangeError, StateError, UnsupportedModelError
from tokencurric.losses import (
    ConsistencyLoss,
    FiniteLosses,
    Head,
    LossSums,
    Taught,
    feature_distance,
    supervised_losses,
)
from tokencurric.teaching import (
    Chosen,
    TeacherSide,
    autocast_of,
    chosen_at,
    refuse_other_tokens,
    refuse_shared_layers,
    separate_pass,
    shared_pass,
    without_dropout,
)
from tokencurric.token_budget import Cut, Ratio

_LOOKS = 10_000  # stages that preflight looks at, evenly spread


@dataclass(frozen=True)
class EpicOutput:
    """One micro-batch.

    Args:
        loss: with a live gradient. stage: what the curriculum said.
        metrics: what to log; tensors are detached and still on their device. `padding` and `student_padding` are the
            shares of positions that are padding, below the compressing layer and from it on.
    """

    loss: Float[Tensor, ""]
    stage: Stage
    metrics: dict[str, float | int | Tensor]


class EPIC:
    """Progressive consistency distillation: (1 − λ)·cross-entropy + λ·consistency, both of a compressed student.

    The student loses the visual tokens that `compressor` drops at the stage's layer and ratio. The teacher has the
    same weights (or is a frozen module), loses fewer, and gets no gradient. With `teacher="self"` both run in one root
    forward and share the layers below the compressing one. Only positions that predict a supervised token go to the
    head, and through the last layer's MLP and its projections of queries and outputs, where these are known to treat
    each position by itself (with `feature_weight` all do, for hidden states are compared). A stage that compresses
    nothing is plain fine-tuning; one whose margin is 0 has nothing to distil, and its loss is (1 − λ)·cross-entropy.

    Hooks are put on the model at the first call and stay until `detach`.

    Args:
        compressor: decides which tokens stay, for teacher and student from one view and seed, so that a nested
            compressor shows the teacher everything the student sees.
        curriculum: what a step does.
        weight: λ in [0, 1]; 0 trains on the compressed tokens without a teacher.
        loss: how teacher and student are compared.
        teacher: "self", or a module with the same vocabulary and visual tokens, and decoder layers of its own. It is
            run frozen at the stage's teacher ratio, on tokens that the student's signals choose: by its own it might
            drop what the student keeps.
        feature_weight: of the mean squared distance between the hidden states of the two, from the compressing layer
            on, at positions that both keep.
        share_prefix: False gives the teacher a forward pass of its own, before the student's. It chooses for both, in
            evaluation mode, as the model alone would.
        allow_unnested: accept a compressor that is not tagged nested.
        adapter: for models that are not from transformers, what makes their `ModelAdapter`.
        fused: of steps without a teacher, see `supervised_losses`.

    Raises:
        NotACompressorError: `compressor` is a name, a class or a plain function, or lacks something.
        RangeError: a weight is out of range, or the compressor is not nested.

    Example:
        >>> from tokencurric import DART, tcd
        >>> objective = EPIC(DART(), tcd(), weight=0.7)
        >>> out = objective(model, batch, step=10, total=5000)  # doctest: +SKIP
        >>> out.loss.backward()  # doctest: +SKIP

    Source: EPIC (arXiv:2510.00515) §3. Differs: the consistency loss counts the positions that predict supervised
    tokens; selection never sees the answer; teacher and student share one draw; see `ConsistencyLoss` for τ².
    """

    def __init__(
        self,
        compressor: Compressor,
        curriculum: Curriculum,
        weight: float | int = 0.7,
        loss: ConsistencyLoss | None = None,
        *,
        teacher: Literal["self"] | nn.Module = "self",
        feature_weight: float | int = 0.0,
        share_prefix: bool = True,
        allow_unnested: bool = False,
        adapter: Callable[[Any], ModelAdapter] | None = None,
        fused: bool | None = None,
    ) -> None:
        require_compressor(compressor, who="EPIC")
        if not 0.0 <= weight <= 1.0:
            raise RangeError(
                f"EPIC needs 0 <= weight <= 1; got weight={weight}. It is λ in (1 − λ)·cross-entropy + λ·consistency. "
                "The paper's value is 0.7."
            )
        if not 0.0 <= feature_weight < float("inf"):
            raise RangeError(
                f"EPIC needs feature_weight >= 0; got feature_weight={feature_weight}. It scales a distance. "
                "0 leaves the feature loss out."
            )
        if not (compressor.tags.nested or allow_unnested or (weight == 0 and feature_weight == 0)):
            raise RangeError(
                f"EPIC needs a nested compressor; got {type(compressor).__name__} with nested=False. Its teacher may "
                "miss tokens the student sees. Pass allow_unnested=True if that is what you want."
            )
        if isinstance(teacher, str) and teacher != "self":
            raise RangeError(f'EPIC needs teacher="self" or a module; got teacher={teacher!r}. Pass the module itself.')
        self.compressor, self.curriculum = compressor, curriculum
        self.weight, self.feature_weight = weight, feature_weight
        self.loss = ConsistencyLoss() if loss is None else loss
        self.teacher, self.share_prefix, self.adapter, self.fused = teacher, share_prefix, adapter, fused
        self._student: Attachment | None = None
        self._teacher: Attachment | None = None
        self._losses = FiniteLosses()

    def attach(self, model: nn.Module) -> None:
        """Put hooks on `model`, after it was wrapped. Called on first use; again for another wrapping of the same.

        The model is called once on two text tokens, in evaluation mode, to see whether it returns its output head's
        logits as they are; all ranks have to attach together. A model with an adapter is called on its first batch.

        Raises:
            UnsupportedModelError: tokens cannot be dropped from the model, or it changes logits after its output head.
            StateError: the objective is attached to another model.
        """
        seam = seam_of(model, self.adapter)
        if self._student is not None:
            if self._student.parts.roots == seam.parts.roots:
                return
            if self._student.parts.base is not seam.parts.base:
                raise StateError(
                    f"EPIC is attached to another {type(self._student.parts.base).__name__}; got a second model. Hooks "
                    "stay so that a backward pass can recompute layers. Call detach() when done with the first."
                )
            self.check_losses()
            self.detach()
        student = Attachment(seam, compiled=_runs_compiled(model))
        try:  # with hooks on, or another compression at work would take part in calls of the model
            seam.refuse_unfit_head()
            refuse_compiled_twice(model, seam.parts)
            teacher = self._teacher_seam(seam)
            self._teacher = None if teacher is None else Attachment(teacher, compiled=_runs_compiled(self.teacher))
        except BaseException:
            student.remove()
            raise
        for each in (student, self._teacher):
            if each is None:
                continue
            if each.forwards.compiled:
                renew(each.parts, each.traces)  # and its last layer runs on everything
            else:
                each.narrow()
        self._student = student

    def preflight(self, model: nn.Module, total: int, seed: int = 0) -> None:
        """Look at the stages of a whole training, so that none of them fails hours into it.

        Args:
            model: that will be trained. total: optimizer steps. seed: of the training.

        Raises:
            UnsupportedModelError, RangeError, MissingSignalError: as the step would that meets it.
        """
        seam = seam_of(model, self.adapter)
        seam.refuse_unfit_head()
        parts, other = seam.parts, self._teacher_seam(seam)
        teacher = None if other is None else other.parts
        for number in range(min(total, _LOOKS)):
            stage = self.curriculum.at(number * total // min(total, _LOOKS), total, seed, layers=parts.depth)
            self._check_stage(stage, parts, teacher)

    def detach(self) -> None:
        """Take the hooks off and leave the model as it was; it may be called again."""
        for attachment in (self._student, self._teacher):
            if attachment is not None:
                attachment.remove()
        self._losses.forget()
        self._student = self._teacher = None

    def check_losses(self) -> None:
        """Wait for all losses handed out so far.

        On a CPU a loss is looked at before it is handed out. On another device that would stop the host in every step,
        so a call raises for the losses of earlier calls that have arrived by then, and this for all. `EpicTrainer`
        calls it before it logs, saves or evaluates: no checkpoint is written after a loss that is not finite.

        Raises:
            RangeError: one is NaN or infinite.
        """
        self._losses.look(wait=True)

    def __call__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        step: int,
        total: int,
        seed: int = 0,
        num_items: int | Tensor | None = None,
    ) -> EpicOutput:
        """The loss of one micro-batch.

        Args:
            model: wrapped or not.
            batch: what the model takes, with `labels`, and optionally `row_key` ([batch] numbers of the samples) and
                `visual_mask` ([batch seq] True at visual tokens), which the model is not called with. With a mask,
                `labels` and it cover the decoder's sequence, and no token id has to tell which tokens are visual.
            step, total: optimizer steps done and in all. seed: of the training.
            num_items: supervised tokens of the whole accumulated batch, on all ranks; None divides by this batch's.

        Returns:
            A loss that is a sum over supervised tokens divided by `num_items`, so that micro-batches add up.

        Raises:
            StateError: the batch has no labels, or neither input_ids nor visual_mask.
            MissingSignalError: the stage's layer lacks a signal.
            RangeError: the loss is NaN or infinite, or that of an earlier call was; see `check_losses`.
        """
        self.attach(model)
        stage = self.curriculum.at(step, total, seed, layers=self._attached.parts.depth)
        return self._run(model, batch, stage, num_items)

    def uncompressed(
        self, model: nn.Module, batch: Mapping[str, Any], num_items: int | Tensor | None = None
    ) -> EpicOutput:
        """Cross-entropy of the model as it is, without compression: what plain fine-tuning minimises.

        Arguments and errors are those of a call.
        """
        self.attach(model)
        depth = self._attached.parts.depth
        stage = Stage(layer=depth, layers=depth, student=0.0, teacher=0.0, margin=0.0, progress=0.0, seed=0)
        return self._run(model, batch, stage, num_items)

    @property
    def _attached(self) -> Attachment:
        if self._student is None:
            raise StateError("EPIC is not attached to a model. Call attach(model) before.")
        return self._student

    def _run(
        self, model: nn.Module, batch: Mapping[str, Any], stage: Stage, num_items: int | Tensor | None
    ) -> EpicOutput:
        attachment = self._attached
        seam, parts = attachment.seam, attachment.parts
        attachment.refuse_nesting()
        self._losses.look()
        self._check_stage(stage, parts, None if self._teacher is None else self._teacher.parts)
        inputs, call, layout = _prepare(batch, seam)
        seam.refuse_changed_output(model, inputs)
        layer, ratio = (stage.layer, stage.student) if stage.compresses else (parts.depth, 0.0)
        request = Request(
            self.compressor,
            (Cut(layer, Ratio(ratio)),),
            stage.seed,
            layout=layout,
            visual=call.visual if layout is None else None,
            labels=batch["labels"] if layout is None else None,
            row_key=batch.get("row_key"),
            ghost=_ghost(seam, inputs, call, layout),
            predictors_only=self.feature_weight == 0,
        )
        distils = (stage.distils or (stage.compresses and self._teacher is not None)) and self._compares
        teach, chosen = self._teaching(model, inputs, call, request, stage) if distils else (None, None)
        sides: list[TeacherSide] = []
        metrics: dict[str, float | int | Tensor] = {
            "student_ratio": stage.student,
            "teacher_ratio": stage.teacher,
            "layer": stage.layer,
            "margin": stage.margin,
        }

        def finish(record: Record, hidden: Tensor) -> Tensor:
            if teach is not None:
                sides.append(teach(record))
            counted, _ = counted_states(record.layout, record.shortened, hidden)
            return counted[None] if len(counted) else hidden[:1, :1]  # where nothing is learnt the head runs, too

        def score(record: Record, reached: Tensor, head: Head) -> Tensor:
            teacher = sides[0] if sides else None
            return self._loss(record, reached[0], head, teacher, stage, num_items, metrics)

        attachment.request = replace(
            request,
            chosen=chosen,
            looks_again=distils,
            capture=distils and self._shares,
            features=distils and self.feature_weight > 0,
            finish=finish,
            score=score,
        )
        try:
            loss = seam.run(model, inputs)
            made = None if attachment.record is None else attachment.record.loss
        finally:
            attachment.settle()
            attachment.request = attachment.record = None
        if loss is None or made is None:
            raise UnsupportedModelError(
                f"EPIC needs a model that calls its output head as a module and returns its logits; "
                f"{type(parts.base).__name__} did not. The loss is made there, where sharded weights are whole. Models "
                "whose forward is logits = self.lm_head(hidden) are supported."
            )
        # On its way out of a sharded model it may have been rounded.
        loss = loss + (made.to(loss.device) - loss).detach()
        where = f"layer {stage.layer}, student ratio {stage.student:.3f}" if stage.compresses else "not compressed"
        self._losses.watch(loss, where)
        return EpicOutput(loss, stage, {"loss": loss.detach(), **metrics})

    def _teacher_seam(self, student: Seam) -> Seam | None:
        if not isinstance(self.teacher, nn.Module):
            return None
        seam = seam_of(self.teacher, self.adapter)
        seam.refuse_unfit_head()
        refuse_shared_layers(student, seam)
        return seam

    def _check_stage(self, stage: Stage, parts: ModelParts, teacher: ModelParts | None) -> None:
        if not stage.compresses:
            return
        check_layer(self.compressor, stage.layer, parts)
        if teacher is not None and stage.teacher > 0 and stage.layer >= teacher.depth:
            raise RangeError(
                f"EPIC needs a teacher that has layer {stage.layer}, where the stage compresses; got one of "
                f"{teacher.depth} layers. It could not run at the stage's teacher ratio {stage.teacher:.3f}. Use a "
                "deeper teacher, a lower layer, or a margin so large that the teacher sees everything."
            )

    @property
    def _compares(self) -> bool:
        return self.weight > 0 or self.feature_weight > 0

    @property
    def _shares(self) -> bool:
        return self._teacher is None and self.share_prefix

    def _teaching(
        self, model: nn.Module, inputs: dict[str, Any], call: Call, request: Request, stage: Stage
    ) -> tuple[Callable[[Record], TeacherSide], Chosen | None]:
        """What makes the teacher's side at the end of the student's decoder, and what the student shall run on.

        Args:
            model, inputs: of the step. call: the batch as the student reads it. request: the student's.

        Returns:
            A function of the student's record; and the student's tokens, where the teacher's pass has chosen them.
        """
        attachment, cut = self._attached, Cut(stage.layer, Ratio(stage.teacher))
        theirs = replace(request, cuts=(cut,), features=self.feature_weight > 0)
        teacher, module = self._teacher, self.teacher
        if teacher is not None and isinstance(module, nn.Module):
            teacher.refuse_nesting()
            teacher.seam.refuse_changed_output(module, inputs)
            kinds = teacher.parts.visual_kinds
            same = any(kinds.values()) and kinds == attachment.parts.visual_kinds
            refuse_other_tokens(call, teacher.seam, inputs, known=same or request.layout is None)
            ghost = _ghost(teacher.seam, inputs, call, request.layout)
            theirs, outside = replace(theirs, ghost=ghost), autocast_of(module)

            def teach(record: Record) -> TeacherSide:
                with outside:
                    handed = replace(theirs, chosen=chosen_at(record, cut))
                    return separate_pass(teacher, module, inputs, handed)[0]

            return teach, None
        if self.share_prefix:
            return lambda record: shared_pass(attachment, record, cut), None
        side, chosen = separate_pass(attachment, model, inputs, theirs, student=request.cuts[0])
        return lambda record: side, chosen

    def _loss(
        self,
        record: Record,
        reached: Tensor,
        head: Head,
        teacher: TeacherSide | None,
        stage: Stage,
        num_items: int | Tensor | None,
        metrics: dict[str, float | int | Tensor],
    ) -> Tensor:
        """The loss of a micro-batch, inside the forward of the output head.

        Args:
            record: of the forward. reached: the student's hidden states that came to the head. head: its computation.
            teacher: what a teacher left; None where nothing is compared.
            stage, num_items: as given. metrics: are filled in.
        """
        layout, shortened = record.layout, record.shortened
        if layout.targets is None or layout.rows is None:
            raise StateError("EPIC needs labels in the batch. Pass what tokencurric.data.ConversationCollator returns.")
        student, kept = reached[: len(layout.rows)], kept_predictors(layout, shortened)
        taught = None
        if teacher is not None and self.weight > 0:
            counts = kept & teacher.kept.to(kept.device)
            if self._teacher is None:
                taught = Taught(teacher.hidden.to(student), without_dropout(self._attached.parts.head, head), counts)
            elif self._teacher.parts.head is not None:
                other = gathered(self._teacher.parts.head, teacher.hidden.dtype)
                quiet = without_dropout(self._teacher.parts.head, other)
                taught = Taught(teacher.hidden.to(student.device), quiet, counts)
        targets = reachable_targets(layout, shortened, layout.targets.to(student.device))
        fused = self.fused if taught is None else None
        sums = supervised_losses(student, targets, head, taught=taught, loss=self.loss, fused=fused)
        items: int | Tensor = max(
            1, sums.sft_count if num_items is None or isinstance(num_items, Tensor) else num_items
        )
        if isinstance(num_items, Tensor):
            items = num_items.clamp(min=1).to(sums.sft.device)
        if stage.compresses:
            loss = ((1 - self.weight) * sums.sft + self.weight * sums.consistency) / items
        else:
            loss = sums.sft / items
        if teacher is not None and self.feature_weight > 0:
            ours, theirs = selection_of(shortened, layout), selection_of(teacher.shortened, layout)
            weights = torch.zeros(len(layout.visual_counts), device=layout.rows.device)
            weights.index_add_(0, layout.rows, torch.ones_like(layout.rows, dtype=weights.dtype))
            distance = feature_distance(record.features, ours, teacher.features, theirs, weights, layout.real)
            metrics["feature_loss"] = distance.detach() / max(1, sums.sft_count)
            loss = loss + self.feature_weight * distance / items
        self._note(metrics, record, kept, sums, teacher)
        return loss

    def _note(
        self,
        metrics: dict[str, float | int | Tensor],
        record: Record,
        kept: Tensor,
        sums: LossSums,
        teacher: TeacherSide | None,
    ) -> None:
        n = max(1, sums.sft_count)
        metrics["sft_loss"] = sums.sft.detach() / n
        metrics["consistency_loss"] = sums.consistency.detach() / n
        metrics["supervised_tokens"] = sums.sft_count
        metrics["displaced_tokens"] = (~kept).sum()
        metrics["padding"], metrics["student_padding"] = padding_shares(record.layout, record.shortened)
        metrics["visual_tokens"] = sum(record.layout.visual_counts)
        metrics["student_tokens"] = visual_tokens(record.layout, record.shortened)
        # A student without a teacher is its own.
        shown = record.shortened if teacher is None else teacher.shortened
        metrics["teacher_tokens"] = visual_tokens(record.layout, shown)


def _runs_compiled(model: Any) -> bool:
    return isinstance(model, nn.Module) and any(map(runs_compiled, model.modules()))


def _prepare(batch: Mapping[str, Any], seam: Seam) -> tuple[dict[str, Any], Call, Layout | None]:
    """What the model is called with, how it reads that, and the layout; with a visual mask the forward makes that."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "row_key", "visual_mask")}
    visual, labels = batch.get("visual_mask"), batch.get("labels")
    if visual is not None and labels is not None:
        # Padding is read from what the decoder is given: the model may put images among the embeddings itself.
        return inputs, Call(visual=visual.bool()), None
    call = seam.read(inputs, (), {}) if labels is not None else None
    if call is None or call.visual is None:
        raise StateError(
            f"EPIC needs input_ids and labels in the batch; got {sorted(batch)}. It makes the loss itself, from the "
            "positions that predict a label. Pass what tokencurric.data.ConversationCollator returns, or, with "
            "inputs_embeds, visual_mask: True at visual tokens."
        )
    return inputs, call, lay_out(call.visual, call.real, labels=batch["labels"])


def _ghost(seam: Seam, inputs: Mapping[str, Any], call: Call, layout: Layout | None) -> Callable[[], Tensor] | None:
    """See `Seam.ghost`; None where a visual mask shows images, under whatever name they come."""
    shown = layout is None and call.visual is not None and bool(call.visual.any())
    return None if shown else seam.ghost(inputs)
