"""Is a quantized encoder still good? Real texts, a head, paired figures, all on a CPU and offline."""

from qbert.evaluate.datasets import Dataset, labelled_dataset, split
from qbert.evaluate.encode import Encoded, encode, encode_texts
from qbert.evaluate.finetune import FineTuned, finetune, finetuned_model
from qbert.evaluate.loading import load_fp32, load_tokenizer
from qbert.evaluate.probe import Probe, fit_probe
from qbert.evaluate.results import Comparison, EvalResult
from qbert.evaluate.run import Baseline, Options, class_map, evaluate, prepare_baseline, score
from qbert.evaluate.tasks import TASKS, Task, TaskData, file_task, get_task, load_task, task_data
from qbert.evaluate.user_file import read_user_file

__all__ = [
    "TASKS",
    "Baseline",
    "Comparison",
    "Dataset",
    "Encoded",
    "EvalResult",
    "FineTuned",
    "Options",
    "Probe",
    "Task",
    "TaskData",
    "class_map",
    "encode",
    "encode_texts",
    "evaluate",
    "file_task",
    "finetune",
    "finetuned_model",
    "fit_probe",
    "get_task",
    "labelled_dataset",
    "load_fp32",
    "load_task",
    "load_tokenizer",
    "prepare_baseline",
    "read_user_file",
    "score",
    "split",
    "task_data",
]
