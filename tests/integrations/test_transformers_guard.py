"""Importing qbert: what it must not import, that transformers then knows it, and what happens where it does not.

Each test is a fresh interpreter: what is imported, in which order, is the point.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

import qbert
from qbert import Recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {
    "w8a8": Recipe("w8a8"),
    "w4a8": Recipe("w4a8"),
    "gobo3": Recipe("gobo3"),
    "w8_table": Recipe(None, "w8"),
    "gobo4_table": Recipe(None, "gobo4"),
}
# Says on the last line, as JSON, what `answer` is.
EPILOGUE = "\nimport json; print(); print(json.dumps(answer))"
BLOCK = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""
HEAVY = """
def heavy():
    import sys
    names = ("transformers.modeling_utils", "qbert.integrations.transformers", "triton", "qbert.kernels", "matplotlib")
    return [name for name in names if name in sys.modules]
"""
LOAD = """
def load(folder):
    import torch
    from transformers import AutoModel
    model = AutoModel.from_pretrained(folder)
    kind = type(model.encoder.layer[0].output.dense).__name__
    with torch.no_grad():
        return kind, model(torch.tensor([[5, 9, 33]])).last_hidden_state.double().sum().item()
"""


def _run(code: str, **variables: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error", **variables}
    command = [sys.executable, "-c", code + EPILOGUE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bare encoder and a masked language model for every recipe."""
    config = BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=16,
    )  # fmt: skip
    made = {}
    for name, recipe in RECIPES.items():
        for model_class in (BertModel, BertForMaskedLM):
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("guard") / f"{name}_{model_class.__name__}"
            qbert.save(qbert.quantize_(model_class(config).eval(), recipe), folder)
            made[folder.name] = folder
    return made


def _expected(folder: Path) -> list[Any]:
    model = qbert.load(folder)
    with torch.no_grad():
        return ["QLinear", model(torch.tensor([[5, 9, 33]])).last_hidden_state.double().sum().item()]


def test_transformers_without_qbert_refuses_our_checkpoints(folders: dict[str, Path]) -> None:
    """It would otherwise leave the weights at their random initialization, and only warn."""
    answer = _run(f"""
import sys
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
answer = {{}}
for name, folder in { ({name: str(folder) for name, folder in folders.items()})!r}.items():
    for loader in (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification):
        try:
            loader.from_pretrained(folder)
            answer[f"{{name}} {{loader.__name__}}"] = "loaded"
        except RuntimeError as error:
            answer[f"{{name}} {{loader.__name__}}"] = str(error)
assert not any(name.partition(".")[0] == "qbert" for name in sys.modules)
""")
    assert len(answer) == 3 * len(folders)
    assert [case for case, message in answer.items() if "mismatched" not in message] == []


def test_qbert_first(folders: dict[str, Path], tmp_path: Path) -> None:
    """`import qbert` is light; transformers, imported later, knows the method. A model may be saved where it came from.

    The tensors of a loaded model are mapped from its file: a loader that wrote over it would crash here.
    """
    folder = folders["w4a8_BertModel"]
    answer = _run(f"""
{HEAVY}
{LOAD}
import qbert, torch
answer = {{"after_import": heavy(), "cuda": torch.cuda.is_initialized()}}
qbert.quantize_(torch.nn.Sequential(torch.nn.Linear(8, 8)), "w8a8+none")(torch.zeros(1, 8))
answer["after_use"] = heavy()
answer["loaded"] = load({str(folder)!r})
model = qbert.load({str(folder)!r})
model.save_pretrained({str(tmp_path)!r})
again = qbert.load({str(tmp_path)!r})
again.save_pretrained({str(tmp_path)!r})
answer["again"] = load({str(tmp_path)!r})
""")
    expected = _expected(folder)
    assert answer == {"after_import": [], "after_use": [], "cuda": False, "loaded": expected, "again": expected}


def test_transformers_first(folders: dict[str, Path]) -> None:
    folder = folders["gobo3_BertModel"]
    answer = _run(f"{LOAD}\nfrom transformers import AutoModel\nimport qbert\nanswer = load({str(folder)!r})")
    assert answer == _expected(folder)


def test_a_failed_import_of_transformers_does_not_lose_the_registration(folders: dict[str, Path]) -> None:
    """Here `import transformers`, which is lazy, came first, and what loads models comes after qbert."""
    folder = folders["w8a8_BertModel"]
    answer = _run(f"""
{LOAD}
import importlib.abc, sys
import transformers, qbert
class FailsOnce(importlib.abc.MetaPathFinder):
    failed = False
    def find_spec(self, name, path=None, target=None):
        if name == "transformers.integrations.accelerate" and not self.failed:
            self.failed = True
            raise ImportError("interrupted")
once = FailsOnce()
sys.meta_path.insert(0, once)
try:
    import transformers.modeling_utils
except ImportError:
    pass
answer = [once.failed, "transformers.modeling_utils" in sys.modules, *load({str(folder)!r})]
""")
    assert answer == [True, False, *_expected(folder)]


def test_without_transformers_and_triton() -> None:
    """What is missing speaks when it is used, by name, with the way to get it."""
    answer = _run(
        BLOCK.format(blocked={"transformers", "triton", "matplotlib"})
        + """
import qbert, torch
model = torch.nn.Sequential(torch.nn.Embedding(9, 64), torch.nn.Linear(64, 8))
qbert.quantize_(model, qbert.Recipe("gobo3", "w8"))
answer = {"shape": list(model(torch.tensor([1, 2])).shape), "rows": len(qbert.explain(model).rows)}
qbert.dequantize_(model)
for name in ("load", "save", "QBertConfig"):
    try:
        getattr(qbert, name)
        answer[name] = "there"
    except qbert.MissingDependency as error:
        answer[name] = str(error)
answer["other"] = hasattr(qbert, "nonsense")
""",
        PATH="",
    )
    messages = [answer.pop(name) for name in ("load", "save", "QBertConfig")]
    assert answer == {"shape": [2, 8], "rows": 2, "other": False}
    assert messages == [
        f"qbert.{name} needs transformers; get it with: pip install 'transformers>=5,<6'"
        for name in ("load", "save", "QBertConfig")
    ]


def test_another_missing_module_is_not_blamed_on_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("qbert.integrations.transformers")
    monkeypatch.setitem(sys.modules, "qbert.integrations.transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"qbert\.integrations\.transformers"):
        _ = qbert.load
