"""Published data sets that the Hugging Face hub has by name, brought into the files that long_files.py reads: `--source TASK=hub`.

    helmet_icl_trec_coarse   CogComp/trec
    helmet_icl_banking77     PolyAI/banking77 (CC BY 4.0)
    longmemeval              xiaowu0162/longmemeval-cleaned (MIT): longmemeval_s_cleaned.json, 280 MB

The others have no such name: HELMET's RAG files are inside an archive of 34 GB (princeton-nlp/HELMET), LoCoMo is a file of its repository on GitHub.
"""
from __future__ import annotations

import os
import tempfile
from pathlib import Path

from huggingface_hub import hf_hub_download

from gguf_packages import cache_dir
from manifests import UserError

HUB = "hub"                         # the word for a path
CONVERTED = "refs/convert/parquet"  # the hub's own copy of a data set whose rows were made by a script, which `datasets` no longer runs
ROWS = {"helmet_icl_trec_coarse": "CogComp/trec", "helmet_icl_banking77": "PolyAI/banking77"}
FILES = {"longmemeval": ("xiaowu0162/longmemeval-cleaned", "longmemeval_s_cleaned.json")}


def fetched(task: str) -> Path:
    """The file or folder that the task reads, downloaded when it is not there yet. UserError where the hub has none, or cannot be reached."""
    if task in FILES:
        repository, name = FILES[task]
        return Path(from_hub(task, hf_hub_download, repository, name, repo_type="dataset"))
    if task in ROWS:
        folder = cache_dir() / "data" / task
        if not folder.is_dir():
            import datasets  # a second of start-up, for those who need it
            keep_rows(from_hub(task, datasets.load_dataset, ROWS[task], revision=CONVERTED), folder)
        return folder
    raise UserError(f"--source {task}={HUB}: the hub has no file of it by name, only {', '.join([*ROWS, *FILES])}; give --source {task}=PATH "
                    f"(a folder of the name {HUB}: ./{HUB})")


def from_hub(task: str, call, *arguments, **settings):
    try:
        return call(*arguments, **settings)
    except Exception as error:  # every failure of the hub (offline, renamed, gated) has the same mends
        raise UserError(f"--source {task}={HUB}: {arguments[0]} does not come from the hub ({type(error).__name__}); it needs a network that reaches "
                        f"it, or the published file: --source {task}=PATH") from error


def keep_rows(rows, folder: Path) -> None:
    """Write train.jsonl and test.jsonl of a DatasetDict; the folder appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as temporary:
        done = Path(temporary) / "done"
        done.mkdir()
        for split in ("train", "test"):
            rows[split].to_json(done / f"{split}.jsonl")
        os.replace(done, folder)
