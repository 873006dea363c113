"""The instruction sets of this machine, for the tests of the C++ kernels."""

import pytest

from recbole_ssm.ops import native

SETS = [] if native.unusable else [name for name in ("baseline", "avx2", "avx512") if not native.select(name)]
if SETS:
    native.select("")


@pytest.fixture(params=SETS)
def instruction_set(request):
    native.select(request.param)
    yield request.param
    native.select("")
