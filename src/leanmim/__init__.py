"""leanmim: masked image modelling that fits the hardware people have.

    import leanmim
    leanmim.pretrain(leanmim.MAE, data="photos", out="run", model="vit_tiny_patch16_224")

A command takes a configuration (``dataclasses.replace(leanmim.MAE, data="photos", out="run")``), its fields by name, or
both. For a loop of one's own: ``model = leanmim.build(leanmim.MAE)``, then ``for loss in model.losses(images): ...``.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from leanmim.by_name import by_name
from leanmim.version import __version__

# Threads that wait for each other's part of a step spin, and beside one other program a run is many times slower for it
# (benchmarks/README.md, "The step"). The variable is read when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:  # for type checkers and editors; when run, a name is imported when it is first asked for
    from leanmim.classifier.finetune import finetune as _finetune
    from leanmim.classifier.predict import predict as _predict
    from leanmim.comparison import compare as _compare
    from leanmim.config import (
        Compare,
        Cost,
        Embed,
        Evaluate,
        Export,
        Finetune,
        Knn,
        Pack,
        Plan,
        Predict,
        Pretrain,
        Probe,
        Publish,
        Report,
        Show,
        Stats,
    )
    from leanmim.costs import cost as _cost
    from leanmim.data import SOURCES
    from leanmim.data.pack import pack as _pack
    from leanmim.data.stats import stats as _stats
    from leanmim.dense import pyramid
    from leanmim.encoders import MASKINGS
    from leanmim.errors import UserError
    from leanmim.evaluators.embed import embed as _embed
    from leanmim.evaluators.evaluate import evaluate as _evaluate
    from leanmim.evaluators.knn import knn as _knn
    from leanmim.evaluators.probe import probe as _probe
    from leanmim.factory import build
    from leanmim.formats import export as _export
    from leanmim.formats.publish import publish as _publish
    from leanmim.mim import MIM
    from leanmim.page import report as _report
    from leanmim.pictures import show as _show
    from leanmim.planner import plan as _plan
    from leanmim.recipes import BIM, FASTMIM, FASTMIM_P, LEAN, LEAN_MEMORY, MAE, PR_MIM, RECIPES, SIMMIM
    from leanmim.targets import TARGETS
    from leanmim.train.pretrain import pretrain as _pretrain
    from leanmim.weights import load_backbone, restore

    compare = by_name(_compare)
    cost = by_name(_cost)
    embed = by_name(_embed)
    evaluate = by_name(_evaluate)
    export = by_name(_export)
    finetune = by_name(_finetune)
    knn = by_name(_knn)
    pack = by_name(_pack)
    plan = by_name(_plan)
    predict = by_name(_predict)
    pretrain = by_name(_pretrain)
    probe = by_name(_probe)
    publish = by_name(_publish)
    report = by_name(_report)
    show = by_name(_show)
    stats = by_name(_stats)

_NAMES = {
    "classifier.finetune": "finetune",
    "classifier.predict": "predict",
    "comparison": "compare",
    "config": "Compare Cost Embed Evaluate Export Finetune Knn Pack Plan Predict Pretrain Probe Publish Report Show Stats",
    "costs": "cost",
    "data": "SOURCES",
    "data.pack": "pack",
    "data.stats": "stats",
    "dense": "pyramid",
    "encoders": "MASKINGS",
    "errors": "UserError",
    "evaluators.embed": "embed",
    "evaluators.evaluate": "evaluate",
    "evaluators.knn": "knn",
    "evaluators.probe": "probe",
    "factory": "build",
    "formats": "export",
    "formats.publish": "publish",
    "mim": "MIM",
    "page": "report",
    "pictures": "show",
    "planner": "plan",
    "recipes": "BIM FASTMIM FASTMIM_P LEAN LEAN_MEMORY MAE PR_MIM RECIPES SIMMIM",
    "targets": "TARGETS",
    "train.pretrain": "pretrain",
    "weights": "load_backbone restore",
}
_COMMANDS = {
    "compare", "cost", "embed", "evaluate", "export", "finetune", "knn", "pack", "plan", "predict", "pretrain", "probe", "publish", "report",
    "show", "stats",
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = [
    "BIM", "FASTMIM", "FASTMIM_P", "LEAN", "LEAN_MEMORY", "MAE", "MASKINGS", "MIM", "PR_MIM", "RECIPES", "SIMMIM", "SOURCES", "TARGETS", "Compare", "Cost",
    "Embed", "Evaluate", "Export", "Finetune", "Knn", "Pack", "Plan", "Predict", "Pretrain", "Probe", "Publish", "Report", "Show", "Stats", "UserError",
    "__version__", "build", "compare", "cost", "embed", "evaluate", "export", "finetune", "knn", "load_backbone", "pack", "plan", "predict",
    "pretrain", "probe", "publish", "pyramid", "report", "restore", "show", "stats",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # a type checker knows the names above and no others

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'leanmim' has no attribute {name!r}")
        found = getattr(import_module(f"leanmim.{_MODULE_OF[name]}"), name)
        globals()[name] = by_name(found) if name in _COMMANDS else found
        return globals()[name]
