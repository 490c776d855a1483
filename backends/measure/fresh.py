"""The command line of a process that runs a module of this very package.

`python -m memplan` would look for a package of that name: where the script lies beside a clone, that is another one than this
process has loaded, or none at all. So a child is told the folder that its parent's code is in.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The package by its folder, whatever that is called and wherever it lies; then the module, as `-m` would run it.
CODE = """
import importlib.util, runpy, sys
folder, module, *sys.argv[1:] = sys.argv[1:]
spec = importlib.util.spec_from_file_location("memplan", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["memplan"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["memplan"])
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def python_running(module: str) -> list[str]:
    """The words that start a module of memplan; its arguments come after. `-P`: what lies in the working directory must not
    shadow a library."""
    return [sys.executable, "-P", "-c", CODE, str(ROOT), module]
