"""One file a method. To add one: write the file, and import its class here."""

from tokencurric.compressors.dart import DART as DART
from tokencurric.compressors.fastv import FastV as FastV
from tokencurric.compressors.protocol import Compressor as Compressor
from tokencurric.compressors.protocol import Tags as Tags
from tokencurric.compressors.protocol import require_compressor as require_compressor
from tokencurric.compressors.random import Random as Random
from tokencurric.compressors.uniform import Uniform as Uniform
