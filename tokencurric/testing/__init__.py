"""Laws for your own compressors, schedules, divergences and models, tried on cases that shrink to a few tokens.

Needs the extra `testing`: `pip install 'tokencurric[testing]'`.
"""

from tokencurric.errors import MissingDependencyError
from tokencurric.errors import NotACompressorError as NotACompressorError

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as error:
    raise MissingDependencyError(
        "tokencurric.testing needs the package hypothesis; got an environment without it. It draws the cases on which "
        "the laws are tried. Run: pip install 'tokencurric[testing]'."
    ) from error

from tokencurric.testing.check import Check as Check
from tokencurric.testing.check import LawError as LawError
from tokencurric.testing.plain import Plain as Plain
from tokencurric.testing.report import Report as Report
from tokencurric.testing.report import check_compressor as check_compressor
from tokencurric.testing.report import check_divergence as check_divergence
from tokencurric.testing.report import check_model as check_model
from tokencurric.testing.report import check_schedule as check_schedule
from tokencurric.testing.report import parametrize_with_checks as parametrize_with_checks
from tokencurric.testing.subjects import compressor_checks as compressor_checks
from tokencurric.testing.subjects import divergence_checks as divergence_checks
from tokencurric.testing.subjects import model_checks as model_checks
from tokencurric.testing.subjects import schedule_checks as schedule_checks
