"""What this machine has, which kernels are usable, and how to install what is missing.

PyTorch is imported only when it is asked about, because the report must come where it is missing or broken, too.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

from recbole_ssm import __version__
from recbole_ssm.errors import INSTALL_RECBOLE, first_line, require

NEEDED = (
    "recbole", "torch", "numpy", "pandas", "pyarrow", "scipy", "safetensors", "scikit-learn", "pyyaml", "tensorboard",
    "tqdm", "colorama", "colorlog", "texttable", "psutil",
)  # fmt: skip
KERNELS = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}
RIVALS = {"fla": "flash-linear-attention"}
INSTALL_NATIVE = "pip install -v -e .   # in the folder of recbole_ssm, with g++ or clang++ on the PATH"
# Since July 2026 mamba-ssm leaves its CUDA kernels out unless the variable is set.
INSTALL_KERNELS = "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation 'mamba-ssm>=2.2.2' 'causal-conv1d>=1.4'"


def report() -> str:
    """The text that ``recbole-ssm doctor`` prints."""
    lines = [
        f"recbole_ssm {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "",
    ]
    missing = []
    wanted = _wanted()
    for package in NEEDED:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"  {package:14} missing")
            missing.append(INSTALL_RECBOLE if package == "recbole" else f"pip install {package}")
            continue
        fits = package not in wanted or wanted[package].contains(version, prereleases=True)
        lines.append(f"  {package:14} {version}{'' if fits else f', but {wanted[package]} is needed'}")
        if not fits:
            missing.append(f"pip install '{package}{wanted[package]}'")
    lines.append("")
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        # An OSError comes of a shared library that is damaged or made for another system.
        lines.append(f"  the device and the kernels are not known without PyTorch ({first_line(error)})")
        if not missing:
            missing.append("pip install --force-reinstall torch")
    else:
        found, lacking = _computing()
        lines += found
        missing += lacking
    lines += ["", "nothing is missing" if not missing else "to install what is missing:"]
    return "\n".join(lines + [f"  {line}" for line in missing])


def _wanted() -> dict[str, Any]:
    """The versions that this package's own metadata asks for, by package; empty where they cannot be read."""
    try:
        from packaging.requirements import Requirement

        found = [Requirement(text) for text in importlib.metadata.requires("recbole_ssm") or ()]
    except ImportError:
        # Of packaging; or of the metadata, where the package was not installed but found by its path.
        return {}
    return {one.name: one.specifier for one in found if one.marker is None}


def _computing() -> tuple[list[str], list[str]]:
    """Lines on the device and on the kernels, and the commands that install what is missing of them."""
    import torch

    # The layers add their steps to the self-test.
    from recbole_ssm import layers, ops  # noqa: F401
    from recbole_ssm.ops import native
    from recbole_ssm.ops.backend import lacks
    from recbole_ssm.ops.triton import tiles

    missing = []
    lines = [f"  device         {_device()}"]
    lines.append(f"  ssm_backend    usable: {', '.join(ops.available_backends())}; auto takes the fastest that fits")
    lines.append(f"  native kernels {native.unusable or 'built; instruction set ' + native.instruction_set}")
    if native.unusable:
        missing.append(INSTALL_NATIVE)
    lines.append(f"  cuda kernels   {lacks('cuda') or 'Triton ' + _triton()}")
    if not lacks("cuda"):
        here = tiles.machine(torch.device("cuda", 0)) if torch.cuda.is_available() else "on no GPU"
        count = sum(kind.endswith(here) for kind in tiles.kept())
        lines.append(f"  tile sizes     chosen for {count} kinds of calls {here}, in {tiles.file()}")
    for module, package in KERNELS.items():
        found = importlib.util.find_spec(module) is not None
        reason = "" if torch.cuda.is_available() else " (it needs an NVIDIA GPU)"
        lines.append(f"  {package:14} {'installed' if found else 'not installed; optional' + reason}")
        if not found and torch.cuda.is_available() and INSTALL_KERNELS not in missing:
            missing.append(INSTALL_KERNELS)
    for module, package in RIVALS.items():
        have = "installed" if importlib.util.find_spec(module) else "not installed"
        lines.append(f"  {package} {have}; our ops do not use it")
    return lines, missing


def _triton() -> str:
    """Triton's version; its distribution is called ``triton``, ``pytorch-triton`` or ``triton-windows``."""
    import triton

    return str(triton.__version__)


def numerics() -> tuple[str, bool]:
    """The text that ``recbole-ssm doctor --numerics`` prints, every backend against the float64 reference, and whether
    all agree with it.

    Raises:
        UserError: PyTorch cannot be imported.
    """
    torch = require("torch")
    # The layers add their steps to the self-test.
    from recbole_ssm import layers  # noqa: F401
    from recbole_ssm.bench import table
    from recbole_ssm.ops import selftest

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    results = [(device, result) for device in devices for result in selftest.run(device)]
    rows = [
        {
            "device": device,
            "op": r.op,
            "backend": r.backend,
            "value error": r.value_error,
            "gradient error": r.gradient_error,
            "ms": r.milliseconds,
            "": "ok" if r.passed else "FAILED",
        }
        for device, r in results
    ]
    right = all(r.passed for _, r in results)
    verdict = "\n\nall backends agree with the float64 reference" if right else ""
    return f"float32, forward and backward; errors relative to the largest entry\n\n{table(rows)}{verdict}", right


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return f"GPU: {torch.cuda.get_device_name(0)}, {memory:.0f} GiB"
    # Threads of OpenMP spin while they wait, and on a busy machine take the cores from each other.
    spins = torch.get_num_threads() > 1 and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive"
    busy = "; where other work runs beside it, set OMP_WAIT_POLICY=passive" if spins else ""
    return f"CPU, {torch.get_num_threads()} threads; no GPU that PyTorch can use{busy}"
