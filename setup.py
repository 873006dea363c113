"""Builds the native kernels where there is a compiler for them; without one, the package installs all the same."""

import hashlib
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

SOURCES = Path("recbole_ssm/csrc")
# recbole_ssm.ops.native compares it with the files, so that nothing older than them is used.
DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.[hc]*")))).hexdigest()
FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]  # -ffast-math would undo the rounding in exp2
# name, floats in a vector, flags; all of them go into one library, which picks when it is loaded
INSTRUCTION_SETS = [("baseline", 4, [])]
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS += [
        ("avx2", 8, ["-mavx2", "-mfma"]),
        ("avx512", 16, ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]),
    ]


class BuildKernels(build_ext):
    """One shared library with a C interface: it belongs to no version of Python, and is loaded by ctypes."""

    def get_ext_filename(self, fullname):
        """A name without the tag of a Python version."""
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext):
        """No PyInit function: this is no module."""
        return []

    def build_extension(self, ext):
        """Compile the kernels once for each instruction set and link all of it together; a failure is a notice."""
        library = Path(self.get_ext_fullpath(ext.name))
        library.unlink(missing_ok=True)  # a failed build must not leave the kernels of older sources behind
        try:
            objects = self.compiler.compile(
                [str(SOURCES / "library.cpp")],
                output_dir=self.build_temp,
                macros=[("SOURCES", f'"{DIGEST}"')],
                extra_postargs=FLAGS,
            )
            for name, floats, flags in INSTRUCTION_SETS:
                objects += self.compiler.compile(
                    [str(SOURCES / "kernels.cpp")],
                    output_dir=f"{self.build_temp}/{name}",
                    macros=[("VL", str(floats)), ("KERNELS", f"kernels_{name}")],
                    extra_postargs=FLAGS + flags,
                )
            self.mkpath(str(library.parent))
            self.compiler.link_shared_object(objects, str(library), libraries=["pthread", "dl"], target_lang="c++")
        except Exception as error:  # no compiler, or none that knows the flags
            print(f"recbole_ssm: the native kernels were not built ({error}); PyTorch's operations take their place")

    def copy_extensions_to_source(self):
        """For an editable install; there too nothing older may stay."""
        (SOURCES.parent / "_native.so").unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def get_outputs(self):
        """The files that were built."""
        return [output for output in super().get_outputs() if Path(output).exists()]


class Wheel(bdist_wheel):
    """Any Python, this platform; any platform where nothing was built."""

    def get_tag(self):
        """As the class says."""
        built = any(Path(self.bdist_dir or ".").rglob("_native.so"))
        return "py3", "none", super().get_tag()[2] if built else "any"


sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
headers = sorted(str(path) for path in SOURCES.glob("*.h"))
setup(
    ext_modules=[Extension("recbole_ssm._native", sources, depends=headers, language="c++", optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
