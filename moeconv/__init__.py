"""moeconv: an offline converter for mixture-of-experts checkpoints.

    plan = moeconv.plan("gpt-oss-120b", "oss-tp8", layout="vllm", tp=8, ep=True)
    moeconv.convert(plan, "oss-tp8")

Nothing is imported before it is used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that has it.
_HOMES = {
    "inspect": "moeconv.api",
    "plan": "moeconv.api",
    "convert": "moeconv.api",
    "verify": "moeconv.verify",
    "load": "moeconv.load",
    "Options": "moeconv.layouts.options",
    "Resources": "moeconv.resources",
    "Result": "moeconv.convert",
    "Progress": "moeconv.execute",
    "Signal": "moeconv.execute",
    "Model": "moeconv.model",
    "Plan": "moeconv.plan",
    "Report": "moeconv.verify",
    "Effort": "moeconv.verify",
    "MoeconvError": "moeconv.errors",
    "UsageError": "moeconv.errors",
    "Refused": "moeconv.errors",
    "BadSource": "moeconv.errors",
    "BadHeader": "moeconv.errors",
    "UnrecognizedTensor": "moeconv.errors",
    "IncompleteModel": "moeconv.errors",
    "ShapeMismatch": "moeconv.errors",
    "NonFiniteValue": "moeconv.errors",
    "VerifyFailed": "moeconv.errors",
    "Locked": "moeconv.errors",
    "IOFailed": "moeconv.errors",
    "Stopped": "moeconv.errors",
    "Interrupted": "moeconv.errors",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604  # the keys are strings

if TYPE_CHECKING:
    from moeconv.api import convert as convert
    from moeconv.api import inspect as inspect
    from moeconv.api import plan as plan
    from moeconv.convert import Result as Result
    from moeconv.errors import BadHeader as BadHeader
    from moeconv.errors import BadSource as BadSource
    from moeconv.errors import IncompleteModel as IncompleteModel
    from moeconv.errors import Interrupted as Interrupted
    from moeconv.errors import IOFailed as IOFailed
    from moeconv.errors import Locked as Locked
    from moeconv.errors import MoeconvError as MoeconvError
    from moeconv.errors import NonFiniteValue as NonFiniteValue
    from moeconv.errors import Refused as Refused
    from moeconv.errors import ShapeMismatch as ShapeMismatch
    from moeconv.errors import Stopped as Stopped
    from moeconv.errors import UnrecognizedTensor as UnrecognizedTensor
    from moeconv.errors import UsageError as UsageError
    from moeconv.errors import VerifyFailed as VerifyFailed
    from moeconv.execute import Progress as Progress
    from moeconv.execute import Signal as Signal
    from moeconv.layouts.options import Options as Options
    from moeconv.load import load as load
    from moeconv.model import Model as Model
    from moeconv.plan import Plan as Plan
    from moeconv.resources import Resources as Resources
    from moeconv.verify import Effort as Effort
    from moeconv.verify import Report as Report
    from moeconv.verify import verify as verify


def __getattr__(name: str) -> Any:
    """Return a public name, importing its module."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'moeconv' has no attribute {name!r}")
    found = getattr(importlib.import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `moeconv.plan` the function: importing the module of that name would hide it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
