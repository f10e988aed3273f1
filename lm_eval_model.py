"""lm-evaluation-harness drives an arm in a mode of long_modes.py, through its own command line.

    python lm_eval_model.py run --model ttt --tasks niah_single_1,ruler_vt --metadata '{"max_seq_lengths": [1024]}' --limit 5 \\
        --model_args model=smollm2-135m,adapter=checkpoints/smollm2-deep,mode=ttt_strict

What follows the script's name is lm-eval's (`run --help`); it needs `pip install "lm-eval[ruler]==0.4.13"`. --model_args of `--model ttt`:
    model          a row of `python model_utils.py`, a folder, or a hub id (default smollm2-135m)
    adapter        checkpoint folder of a memory arm, for the modes that write
    tuned_adapter  checkpoint folder of a LoRA that was trained with --objective context, in place of an arm: its one mode is in_context_tuned
    mode           in_context, ttt_paper or ttt_strict; ttt_empty of an arm of --w-down, ttt_sharp of one that solves (without an adapter: in_context);
                   ttt_foreign, in which what another of the task's documents that are asked (the next one) left stands in place of a document's own
    clip           the most that a chunk may change a layer's W_down while it is written, as a share of |W_down| (default: no limit)
    question_at    words at which a prompt's question begins: at the last place where they stand, with the white space before them. What stands
                   before it, solved examples too, is the document. Known for RULER's tasks
    dtype          auto, float32 or bfloat16

generate_until and loglikelihood run in every mode; one that drops the document, or writes it alone, refuses a task whose question nobody has
named. loglikelihood_rolling scores a text that has no question: in_context, in_context_tuned, and ttt_paper of an arm with chunks. Answers are greedy and
have no chat template. Tasks that size their texts by a tokenizer get the model's own, unless --metadata names another. `register()` does the same for Python.
"""
from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from decoding import SEGMENT, check_window, forward_all, greedy, pad_left
from halving import Items, in_halves
from long_modes import FOREIGN, MODES, PLAIN, TUNED, Words, asked, check_folders, check_mode, default_mode, next_texts, splits
from long_tasks import tokenizer_folder
from manifests import UserError, current_commit, run_script
from model_utils import find_row, load_arm, load_model, pick_device
from prompts import encode, written_ids
from scoring import InPlace, Off, Plan, Score, start_token

NAME, VERSION = "ttt", "0.4.13"
DEFAULT_MODEL, DEFAULT_NEW_TOKENS = "smollm2-135m", 256            # the second is lm-eval's
QUESTION_AT = {"niah_": "What ", "ruler_": "Question: "}           # the beginning of a task's name -> that of its question
WORDS = Words("--model_args ", "mode=", "adapter=FOLDER", "tuned_adapter=FOLDER", "clip=")
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names of one setting; the first one counts


@dataclass(frozen=True)
class Row:
    """One request in tokens. place: in lm-eval's list; rest: the continuation to score; kind: rows of one kind can be asked together; other: in ttt_foreign the
    document that is written in place of its own."""

    place: int
    document: list[int]
    question: list[int]
    rest: list[int]
    kind: tuple
    other: list[int] | None = None

    @property
    def tokens(self) -> int:
        return len(self.document) + len(self.question) + len(self.rest)


@dataclass(frozen=True)
class Batch(Items):
    """Rows that are asked together."""

    kind: str

    @property
    def first(self) -> str:
        return f"request {self.items[0].place}"


class ModeModel:
    """lm-eval's three requests, answered by an arm in a mode. Needs nothing of lm-eval: a request has args, task_name and doc_id, as its Instance."""

    def __init__(self, model=DEFAULT_MODEL, adapter=None, tuned_adapter=None, mode=None, clip=None, question_at=None, dtype="auto", batch_size=1,
                 device=None, max_batch_size=None, **unknown):
        """The arguments of --model_args (above), then what lm-eval adds from its own command line. Raises UserError for what cannot be used."""
        super().__init__()
        for name in unknown:
            raise UserError(f"--model_args {name}=...: unknown; use some of model, adapter, tuned_adapter, mode, clip, question_at, dtype")
        mode = mode or default_mode(adapter, tuned_adapter)
        if mode not in (*MODES, TUNED):
            raise UserError(f"--model_args mode={mode}: use one of {', '.join((*MODES, TUNED))}")
        if clip is not None and type(clip) not in (int, float):
            raise UserError(f"--model_args clip={clip}: give a share of |W_down| such as 0.001")
        check_folders([mode], adapter, tuned_adapter, clip, WORDS)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size}: give a number, 1 or more")
        device = "auto" if device in (None, "cuda:0") else device  # cuda:0 is what lm-eval says when nobody has said anything
        if device not in ("auto", "cpu", "cuda") or dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"--device {device}, dtype={dtype}: use cpu or cuda, and auto, float32 or bfloat16")
        row = find_row(model)
        device, dtype, _ = pick_device(device, dtype, row)
        self.loaded = load_model(model, device, dtype)
        self.ttt, self.manifest = load_arm(adapter, tuned_adapter, self.loaded, clip, WORDS.before + WORDS.clip)
        check_mode(mode, self.manifest, f"--model_args mode={mode}")
        self.mode, self.clip, self.question_at, self.batch_size = mode, clip, question_at, int(batch_size)
        self.tokenizer = self.loaded.tokenizer

    # ---- the requests ----

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The greedy answer to each (prompt, settings), up to the first of its stops."""
        rows, stops = [], []
        for place, request in enumerate(requests):
            until, new_tokens = generation(request.args[1], request.task_name)
            stops.append(until)
            rows.append(self._row(place, request, request.args[0], [], (new_tokens, "\n" in until)))
            check_window(self.loaded.model, rows[-1].tokens + new_tokens, named(request))
        said = self._answers(self._with_others(rows, requests), self._generate, disable_tqdm)
        return [cut(text, until) for text, until in zip(said, stops)]

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats of each continuation of its prompt, whether it is the greedy one)."""
        rows = []
        for place, request in enumerate(requests):
            prompt = request.args[0].rstrip()  # as lm-eval does: white space goes with the word that follows it
            rest = encode(self.tokenizer, request.args[0][len(prompt):] + request.args[1])
            rows.append(self._row(place, request, prompt, rest, ()))
            check_window(self.loaded.model, rows[-1].tokens, named(request))
        return self._answers(self._with_others(rows, requests), self._score, disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each whole text. One that the window does not hold is read in windows (scoring.Plan); in ttt_paper the memory
        goes on from one to the next."""
        if requests and self.mode not in PLAIN and (self.mode != "ttt_paper" or splits(self.mode, self.ttt)):
            raise UserError(f"{requests[0].task_name}: scores texts that have no question (loglikelihood_rolling), which {self.mode} of this arm "
                            "does not; use mode=in_context, an arm with chunks in ttt_paper, or score_lm.py")
        window = self.loaded.model.config.get_text_config().max_position_embeddings - 1  # the start token is one more
        begin = start_token(self.tokenizer)
        if self.mode in PLAIN:
            scorer = Off(self.loaded, Plan(window, window, begin))
        else:
            chunk = self.ttt.config.chunk
            scorer = InPlace(self.loaded, self.ttt, Plan(window, window // chunk * chunk, begin), max(1, SEGMENT // chunk) * chunk)
        texts = (encode(self.tokenizer, request.args[0]) for request in tqdm(requests, desc=self.mode, disable=disable_tqdm))
        return [sum(event.realised.double().sum().item() for event in scorer.events(ids) if isinstance(event, Score)) for ids in texts]

    # ---- how they are asked ----

    def _row(self, place: int, request, prompt: str, rest: list[int], kind: tuple) -> Row:
        document, question = self._split(prompt, request)
        written = written_ids(self.tokenizer, document) if prompt else [start_token(self.tokenizer)]
        return Row(place, written, encode(self.tokenizer, question), rest, kind)

    def _with_others(self, rows: list[Row], requests) -> list[Row]:
        """The rows, in the order of their requests; in ttt_foreign each with another document of its task."""
        if self.mode != FOREIGN:
            return rows
        others = next_texts([request.task_name for request in requests], [row.document for row in rows])
        for request, other in zip(requests, others):
            if other is None:
                raise UserError(f"{named(request)}: {FOREIGN} writes another text of the task, and there is one alone; ask more of it (--limit), or take another mode")
        return [replace(row, other=other) for row, other in zip(rows, others)]

    def _split(self, prompt: str, request) -> tuple[str, str]:
        """(document, question) of a prompt, the same in every mode; all of it is the document where that makes no difference."""
        task = request.task_name
        marker = self.question_at or next((words for beginning, words in QUESTION_AT.items() if task.startswith(beginning)), None)
        if marker is None and not splits(self.mode, self.ttt):
            return prompt, ""
        if marker is None:
            raise UserError(f"{task}: {self.mode} of this arm needs to know where a prompt's question begins; add question_at=WORDS to --model_args")
        document = prompt[:max(0, prompt.rfind(marker))].rstrip()
        if not document:
            raise UserError(f"{named(request)}: has no text before a {marker!r}, so nothing to write; "
                            "name with question_at=WORDS where the question begins")
        return document, prompt[len(document):]

    def _answers(self, rows: list[Row], ask, quiet: bool) -> list:
        """ask(batch) for all rows, the longest first; the answers in the order of the rows."""
        kinds, answers = defaultdict(list), {}
        for row in sorted(rows, key=lambda row: -row.tokens):
            kinds[row.kind].append(row)
        batches = [Batch(group[i:i + self.batch_size], self.mode) for group in kinds.values() for i in range(0, len(group), self.batch_size)]
        with tqdm(total=len(rows), desc="asking", disable=quiet) as bar:
            for batch, said in in_halves(batches, ask, bar):
                answers.update(zip((row.place for row in batch.items), said))
                bar.update(batch.count)
        return [answers[place] for place in range(len(rows))]

    def _asked(self, batch: Batch):
        documents, questions = [row.document for row in batch.items], [row.question for row in batch.items]
        others = [row.other for row in batch.items] if self.mode == FOREIGN else None
        return asked(self.loaded.model, self.tokenizer, self.ttt, self.mode, documents, questions, others)

    @torch.inference_mode()
    def _generate(self, batch: Batch) -> list[str]:
        new_tokens, line = batch.items[0].kind
        with self._asked(batch) as (logits, past, session):
            return greedy(self.loaded.model, self.tokenizer, logits, past, new_tokens, session, line=line, stripped=False)

    @torch.inference_mode()
    def _score(self, batch: Batch) -> list[tuple[float, bool]]:
        rests = [row.rest for row in batch.items]
        with self._asked(batch) as (first_BV, past, session):
            logits = first_BV[:, None]
            if max(map(len, rests)) > 1:
                ids, mask = pad_left([rest[:-1] for rest in rests], self.tokenizer.pad_token_id, first_BV.device)
                logits = torch.cat([logits, forward_all(self.loaded.model, ids, mask, past, session)[0]], 1)
        return [likelihood(first_V, rest_LV, rest) for first_V, rest_LV, rest in zip(logits[:, 0], logits[:, 1:], rests)]

    # ---- what lm-eval asks about the model ----

    def get_model_info(self) -> dict:
        """What lm-eval keeps beside its results."""
        return {"mode": self.mode, "clip": self.clip, "question_at": self.question_at, "arm": self.manifest.get("arm"), "model_sha256": self.loaded.sha256,
                "adapter_sha256": next(iter(self.manifest["files"].values())) if self.manifest else None,
                "dtype": str(self.loaded.model.dtype).removeprefix("torch."), "commit": current_commit()}

    def set_cache_hook(self, hook) -> None:
        refuse_cache()

    @property
    def tokenizer_name(self) -> str:
        raise UserError("--apply_chat_template: document and question are asked without a chat template, as the arms were trained; leave it out")


def named(request) -> str:
    return f"{request.task_name} document {request.doc_id}"


def refuse_cache() -> None:
    raise UserError("--use_cache: lm-eval's cache knows neither weights nor mode and would give one arm another's answers; leave it out")


def generation(settings: dict, task: str) -> tuple[list[str], int]:
    """(stops, most new tokens) of a request's settings; UserError for what would not be a greedy answer."""
    settings = dict(settings)
    until, do_sample, temperature = (settings.pop(name, None) for name in ("until", "do_sample", "temperature"))
    lengths = [length for name in LENGTHS if (length := settings.pop(name, None)) is not None]
    if do_sample or (do_sample is None and float(temperature or 0) > 0):
        raise UserError(f"{task}: asks for samples, and answers here are greedy; use --gen_kwargs do_sample=false")
    for name in sorted(set(settings) - {"top_p", "top_k"}):  # these two say how to sample, and nobody samples
        raise UserError(f"{task}: the setting {name} of generation is unknown; leave it out")
    return ([until] if isinstance(until, str) else list(until or [])), int(lengths[0]) if lengths else DEFAULT_NEW_TOKENS


def cut(text: str, stops: list[str]) -> str:
    """The text up to the first stop."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text


def likelihood(first_V: torch.Tensor, rest_LV: torch.Tensor, tokens: list[int]) -> tuple[float, bool]:
    """(log-probability, greedy or not) of tokens: the first by its logits, the others by the last ones of a row that is padded on the left."""
    logits_NV = torch.cat([first_V[None], rest_LV[len(rest_LV) - max(0, len(tokens) - 1):]])[:len(tokens)].float()
    targets_N = torch.tensor(tokens, dtype=torch.long, device=logits_NV.device)
    scores_N = torch.log_softmax(logits_NV, -1).gather(1, targets_N[:, None])
    return scores_N.double().sum().item(), bool((logits_NV.argmax(-1) == targets_N).all())


@functools.cache
def register() -> type:
    """Put the model class into lm-eval's registry, under NAME, and return it. UserError where lm-eval is not installed."""
    try:
        import lm_eval.models  # noqa: F401  lm-eval fills its registry only while that is empty: so before a name is added
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise UserError(f"lm-evaluation-harness cannot be imported ({error}); pip install \"lm-eval[ruler]=={VERSION}\"") from error

    @register_model(NAME)
    class TTTModel(ModeModel, LM):
        """See lm_eval_model.py."""

    return TTTModel


def main() -> None:
    register()
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging
    setup_logging()
    command_line = HarnessCLI()
    arguments = command_line.parse_args()
    if getattr(arguments, "model", None) == NAME:
        if arguments.use_cache:  # here as well as in set_cache_hook: by then lm-eval has made the file
            refuse_cache()
        folder = tokenizer_folder((arguments.model_args or {}).get("model", DEFAULT_MODEL))
        arguments.metadata = ({} if folder is None else {"tokenizer": str(folder)}) | (arguments.metadata or {})
    command_line.execute(arguments)


if __name__ == "__main__":
    run_script(main)
