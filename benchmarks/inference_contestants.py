"""Ask one contestant of benchmarks.inference, in a process of its own: `python -m
benchmarks.inference_contestants JOB`.

JOB is a JSON file that holds a `Job`. The last line of the output is JSON:

speed          rows a second, or tokens a second where the job's method is `generate`
load_s         seconds until the model is ready, the runtime's import included
cores_busy     processor seconds a second while the rows were answered
rss_mb         the process's peak memory (MiB), its Python and libraries included
answers        for each row the options' probabilities, or the tokens that were generated

llama.cpp and OpenVINO run in another environment (.venv-peers), which has neither Distillery nor
its packages: what belongs to one contestant is imported where it is made.
"""

import json
import resource
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

TOKENS = 64
"""How many tokens `generate` gives for each prompt at most."""

Row = dict[str, Any]
"""`prompt`, token ids; `letters`, the token ids of the options' letters; `texts`, those of their
texts; `example`, an Example that the product renders itself; `ends`, tokens that end a text."""

Settings = dict[str, Any]


class Job(TypedDict):
    """What a process is asked. `files`: paths that contestants load, by name. `method`: of
    `Contestant`. `warm_up`: how many rows are asked before the time is taken."""

    contestant: str
    settings: Settings
    threads: int
    files: dict[str, Any]
    method: str
    rows: list[Row]
    warm_up: int


class Contestant(ABC):
    """A runtime with a loaded model. Each method answers rows; `settings` has `batch` where several
    of them may be computed together."""

    @abstractmethod
    def choice(self, rows: list[Row]) -> list[list[float]]:
        """Return for each row the softmax over its letters' logits after the prompt."""

    def file(self, rows: list[Row]) -> list[list[float]]:
        """Return what `choice` does, by the way for files."""
        return self.choice(rows)

    @abstractmethod
    def text(self, rows: list[Row]) -> list[list[float]]:
        """Return for each row the softmax over its texts' mean log-probabilities, one row after
        another."""

    @abstractmethod
    def generate(self, rows: list[Row]) -> list[list[int]]:
        """Return for each row the TOKENS most probable tokens after the prompt, up to the first of
        its `ends`, one row after another."""


class Ours(Contestant):
    """The product's own calls: those of the server, and of a file those of batch inference, which
    renders and tokenizes the rows and writes the predictions too."""

    def __init__(self, settings: Settings, threads: int, files: dict[str, Any]) -> None:
        from distillery.serving.student import ServedStudent

        folder = files[settings.get("file") or form_title(settings)]
        self.student = ServedStudent(Path(folder), threads)
        self.prompt = files["prompt"]

    def choice(self, rows: list[Row]) -> list[list[float]]:
        return self.one_by_one(rows, "letters")

    def file(self, rows: list[Row]) -> list[list[float]]:
        from distillery.inference.batch import score_file
        from distillery.recipe import PromptRecipe
        from distillery.records import Example

        examples = [Example.model_validate(row["example"]) for row in rows]
        with tempfile.TemporaryDirectory() as out:
            prompt = PromptRecipe.model_validate(self.prompt)
            score_file(self.student, examples, prompt, Path(out))
            lines = (Path(out) / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        return [list(json.loads(line)["probabilities"].values()) for line in lines]

    def text(self, rows: list[Row]) -> list[list[float]]:
        return self.one_by_one(rows, "texts")

    def one_by_one(self, rows: list[Row], options: str) -> list[list[float]]:
        """Return the probabilities of each row's `options`, letters or texts."""
        from distillery.training.rows import TrainingRow

        found = []
        for row in rows:
            asked = {"prompt": row["prompt"], options: row[options], "answer": 0}
            found += self.student.probabilities([TrainingRow.model_validate(asked)])
        return found

    def generate(self, rows: list[Row]) -> list[list[int]]:
        from distillery.inference.onnx_student import OnnxStudent

        generator = self.student.needed_generator()
        writing = generator if isinstance(generator, OnnxStudent) else generator.batch
        found = []
        for row in rows:
            writing.end_ids = frozenset(row.get("ends", ()))
            found.append([token for token, _ in writing.steps(row["prompt"], TOKENS)])
        return found


class Transformers(Contestant):
    """PyTorch. What all prompts begin with is computed once; of the head, the letters alone where
    letters are asked. Rows of like length are padded to one batch."""

    def __init__(self, settings: Settings, threads: int, files: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)
        options = {"dtype": settings["dtype"], "attn_implementation": settings["attention"]}
        model: Any = AutoModelForCausalLM.from_pretrained(
            files["base"], trust_remote_code=False, **options
        )
        model.eval().requires_grad_(False)
        self.torch, self.model = torch, model.model
        self.head = model.lm_head.weight
        self.batch = settings.get("batch", 1)

    def choice(self, rows: list[Row]) -> list[list[float]]:
        start, begun = self.begin(rows)
        found: dict[int, list[float]] = {}
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["prompt"]))
        for first in range(0, len(order), self.batch):
            batch = order[first : first + self.batch]
            rest = [rows[index]["prompt"][start:] for index in batch]
            hidden = self.hidden(rest, self.copies(begun, len(batch)))
            for place, index in enumerate(batch):
                logits = self.head[rows[index]["letters"]] @ hidden[place, len(rest[place]) - 1]
                found[index] = self.torch.softmax(logits.double(), -1).tolist()
        return [found[index] for index in range(len(rows))]

    def text(self, rows: list[Row]) -> list[list[float]]:
        start, begun = self.begin(rows)
        found = []
        for row in rows:
            cache, texts = self.copies(begun, 1), row["texts"]
            first = self.logits(self.hidden([row["prompt"][start:]], cache)[:, -1])
            following = np.empty((len(texts), 0, first.shape[-1]), np.float32)
            if max(map(len, texts)) > 1:
                cache.batch_repeat_interleave(len(texts))
                following = self.logits(self.hidden([text[:-1] for text in texts], cache))
            found.append(text_probabilities(first[0], following, texts))
        return found

    def generate(self, rows: list[Row]) -> list[list[int]]:
        start, begun = self.begin(rows)
        found = []
        for row in rows:
            cache, said = self.copies(begun, 1), []
            tokens = row["prompt"][start:]
            for _ in range(TOKENS):
                hidden = self.hidden([tokens], cache)[0, -1]
                said.append(int((self.head @ hidden).argmax()))
                tokens = said[-1:]
                if tokens[0] in row.get("ends", ()):
                    break
            found.append(said)
        return found

    def begin(self, rows: list[Row]) -> tuple[int, Any]:
        """Return how many tokens all prompts begin with, and the cache after these."""
        from transformers import DynamicCache

        prompts = [row["prompt"] for row in rows]
        start, cache = common_start(prompts), DynamicCache()
        if start:
            self.hidden([prompts[0][:start]], cache)
        return start, cache

    def copies(self, begun: Any, count: int) -> Any:
        """Return a cache in which `count` sequences go on from `begun`."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, layer in enumerate(begun.layers):
            keys = layer.keys.expand(count, -1, -1, -1)
            cache.update(keys, layer.values.expand(count, -1, -1, -1), number)
        return cache

    def hidden(self, sequences: list[list[int]], cache: Any) -> Any:
        """Return the last hidden states, [sequences, longest, width]."""
        tokens = self.torch.tensor(padded(sequences))
        return self.model(tokens, past_key_values=cache, use_cache=True).last_hidden_state

    def logits(self, hidden: Any) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = (hidden @ self.head.T).float().numpy()
        return logits


class LlamaCpp(Contestant):
    """llama.cpp through its C interface. The logits are computed where they are read. One row: what
    it shares with the row before stays in the cache; several: they share the cells of what all
    prompts begin with."""

    def __init__(self, settings: Settings, threads: int, files: dict[str, Any]) -> None:
        import llama_cpp

        cpp: Any = llama_cpp
        self.cpp, self.batch = cpp, settings.get("batch", 1)
        model = cpp.llama_model_load_from_file(
            files[settings["weights"]].encode(), cpp.llama_model_default_params()
        )
        options = cpp.llama_context_default_params()
        # A larger context would take memory that no row needs.
        options.n_ctx = options.n_batch = max(1024, 256 * self.batch)
        # Sequence 0 holds what the others go on from.
        options.n_seq_max = max(self.batch, 26) + 1
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        options.kv_unified = True
        self.context = cpp.llama_init_from_model(model, options)
        self.memory = cpp.llama_get_memory(self.context)
        self.vocabulary = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
        self.pass_ = cpp.llama_batch_init(options.n_batch, 0, 1)
        self.kept: list[int] = []

    def choice(self, rows: list[Row]) -> list[list[float]]:
        if self.batch == 1:
            return [softmax(self.prompt(row["prompt"])[row["letters"]]) for row in rows]
        start = common_start([row["prompt"] for row in rows])
        self.prompt(rows[0]["prompt"][:start])
        found = []
        for first in range(0, len(rows), self.batch):
            batch = rows[first : first + self.batch]
            rest = [row["prompt"][start:] for row in batch]
            last = [[len(tokens) - 1] for tokens in rest]
            for row, logits in zip(batch, self.branches(rest, last, start), strict=True):
                found.append(softmax(logits[0][row["letters"]]))
        return found

    def text(self, rows: list[Row]) -> list[list[float]]:
        found = []
        for row in rows:
            first, texts = self.prompt(row["prompt"]), row["texts"]
            rest = [text[:-1] for text in texts]
            asked = [list(range(len(tokens))) for tokens in rest]
            following = self.branches(rest, asked, len(row["prompt"]))
            found.append(text_probabilities(first, following, texts))
        return found

    def generate(self, rows: list[Row]) -> list[list[int]]:
        found = []
        for row in rows:
            said = [int(self.prompt(row["prompt"]).argmax())]
            while len(said) < TOKENS and said[-1] not in row.get("ends", ()):
                logits = self.decode([(said[-1], len(self.kept), 0, True)])[0]
                self.kept.append(said[-1])
                said.append(int(logits.argmax()))
            found.append(said)
        return found

    def prompt(self, tokens: list[int]) -> NDArray[np.float32]:
        """Return the logits after the tokens, which sequence 0 then holds."""
        if not tokens:
            return np.empty(0, np.float32)
        shared = common_start([tokens, [*self.kept, -1]])
        self.cpp.llama_memory_seq_rm(self.memory, 0, shared, -1)
        last = len(tokens) - 1
        places = range(shared, len(tokens))
        entries = [(tokens[place], place, 0, place == last) for place in places]
        logits: NDArray[np.float32] = self.decode(entries)[0]
        self.kept = list(tokens)
        return logits

    def branches(
        self, sequences: list[list[int]], asked: list[list[int]], start: int
    ) -> list[NDArray[np.float32]]:
        """Return for each sequence, which goes on from the first `start` tokens of sequence 0, the
        logits after its tokens at the indices `asked`."""
        entries = []
        for number, tokens in enumerate(sequences, 1):
            if start:
                self.cpp.llama_memory_seq_cp(self.memory, 0, number, 0, start)
            for place, token in enumerate(tokens):
                entries.append((token, start + place, number, place in asked[number - 1]))
        logits = self.decode(entries)
        for number in range(1, len(sequences) + 1):
            self.cpp.llama_memory_seq_rm(self.memory, number, -1, -1)
        ends = np.cumsum([len(places) for places in asked])
        found: list[NDArray[np.float32]] = np.split(logits, ends[:-1])
        return found

    def decode(self, entries: list[tuple[int, int, int, bool]]) -> NDArray[np.float32]:
        """Compute tokens, each with its position, its sequence and whether the logits after it are
        wanted; return these, [wanted, vocabulary]."""
        pass_ = self.pass_
        pass_.n_tokens = len(entries)
        for index, (token, place, sequence, wanted) in enumerate(entries):
            pass_.token[index], pass_.pos[index] = token, place
            pass_.n_seq_id[index], pass_.seq_id[index][0] = 1, sequence
            pass_.logits[index] = wanted
        if entries and self.cpp.llama_decode(self.context, pass_):
            raise RuntimeError("llama_decode failed")
        found = np.empty((sum(entry[3] for entry in entries), self.vocabulary), np.float32)
        wanted_at = [index for index, entry in enumerate(entries) if entry[3]]
        for number, index in enumerate(wanted_at):
            logits = self.cpp.llama_get_logits_ith(self.context, index)
            found[number] = np.ctypeslib.as_array(logits, (self.vocabulary,))
        return found


class OpenVino(Contestant):
    """OpenVINO over a stateful model as optimum-intel exports it. What all prompts begin with is
    computed once and put back into the state. The head reads the positions that are asked."""

    def __init__(self, settings: Settings, threads: int, files: dict[str, Any]) -> None:
        import openvino

        self.openvino: Any = openvino
        core = self.openvino.Core()
        model = core.read_model(Path(files[settings["weights"]]) / "openvino_model.xml")
        self.read_positions(model)
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": settings["precision"],
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        self.request = core.compile_model(model, "CPU", options).create_infer_request()
        self.batch = settings.get("batch", 1)

    def read_positions(self, model: Any) -> None:
        """Let the head read the states at the model's new input, `positions` [sequences, asked]."""
        from openvino import opset13

        ops: Any = opset13
        head = model.output("logits").get_node().input_value(0).get_node()
        positions = ops.parameter([-1, -1], np.int64, name="positions")
        positions.output(0).set_names({"positions"})
        asked = ops.gather(head.input_value(0), positions, 1, batch_dims=1)
        head.input(0).replace_source_output(asked.output(0))
        model.add_parameters([positions])
        model.validate_nodes_and_infer_types()

    def choice(self, rows: list[Row]) -> list[list[float]]:
        start, begun = self.begin(rows)
        found: dict[int, list[float]] = {}
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["prompt"]))
        for first in range(0, len(order), self.batch):
            batch = order[first : first + self.batch]
            rest = [rows[index]["prompt"][start:] for index in batch]
            self.put_back(begun)
            last = [[len(tokens) - 1] for tokens in rest]
            logits = self.infer(rest, last, start, [0] * len(batch))
            for place, index in enumerate(batch):
                found[index] = softmax(logits[place, 0, rows[index]["letters"]])
        return [found[index] for index in range(len(rows))]

    def text(self, rows: list[Row]) -> list[list[float]]:
        start, begun = self.begin(rows)
        found = []
        for row in rows:
            self.put_back(begun)
            rest, texts = row["prompt"][start:], row["texts"]
            first = self.infer([rest], [[len(rest) - 1]], start, [0])[0, 0]
            longest = max(map(len, texts)) - 1
            following = np.empty((len(texts), 0, len(first)), np.float32)
            if longest:
                everywhere = [list(range(longest))] * len(texts)
                following = self.infer(
                    [text[:-1] for text in texts], everywhere, len(row["prompt"]), [0] * len(texts)
                )
            found.append(text_probabilities(first, following, texts))
        return found

    def generate(self, rows: list[Row]) -> list[list[int]]:
        start, begun = self.begin(rows)
        found = []
        for row in rows:
            self.put_back(begun)
            tokens, before, said = row["prompt"][start:], start, []
            for _ in range(TOKENS):
                logits = self.infer([tokens], [[len(tokens) - 1]], before, [0])
                before += len(tokens)
                said.append(int(logits[0, 0].argmax()))
                tokens = said[-1:]
                if tokens[0] in row.get("ends", ()):
                    break
            found.append(said)
        return found

    def begin(self, rows: list[Row]) -> tuple[int, list[Any]]:
        """Return how many tokens all prompts begin with, and the state after these."""
        prompts = [row["prompt"] for row in rows]
        start = common_start(prompts)
        self.request.reset_state()
        if not start:
            return 0, []
        self.infer([prompts[0][:start]], [[start - 1]], 0, [0])
        tensor = self.openvino.Tensor
        states = self.request.query_state()
        return start, [tensor(np.array(state.state.data)) for state in states]

    def put_back(self, begun: list[Any]) -> None:
        """Set the state to what `begin` returned."""
        self.request.reset_state()
        if begun:
            for state, kept in zip(self.request.query_state(), begun, strict=True):
                state.state = kept

    def infer(
        self, sequences: list[list[int]], asked: list[list[int]], before: int, past: list[int]
    ) -> NDArray[np.float32]:
        """Return the logits at the indices `asked`, [sequences, asked, vocabulary]. Each sequence
        goes on after `before` tokens, those of the state's sequence that `past` names."""
        tokens = np.array(padded(sequences))
        count, longest = tokens.shape
        places = np.arange(before, before + longest)
        self.request.infer(
            {
                "input_ids": tokens,
                "attention_mask": np.ones((count, before + longest), np.int64),
                "position_ids": np.tile(places, (count, 1)),
                "beam_idx": np.array(past, np.int32),
                "positions": np.array(asked),
            }
        )
        return np.array(self.request.get_tensor("logits").data)


CONTESTANTS: dict[str, Any] = {
    "ours": Ours,
    "plain": Ours,
    "llama_cpp": LlamaCpp,
    "hf": Transformers,
    "openvino": OpenVino,
}


def form_title(settings: Settings) -> str:
    """Return the title of the form that the settings, fields of an ExportForm, describe."""
    from distillery.recipe import ExportForm

    return ExportForm(**settings).title


def common_start(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with, of which each has one more at least."""
    shortest = min(map(len, prompts)) - 1
    for index in range(shortest):
        if len({ids[index] for ids in prompts}) > 1:
            return index
    return shortest


def padded(sequences: list[list[int]]) -> list[list[int]]:
    """Return the sequences padded behind to one length. A causal model does not look ahead, so that
    nothing before the padding changes."""
    longest = max(map(len, sequences))
    return [ids + [0] * (longest - len(ids)) for ids in sequences]


def softmax(logits: NDArray[Any]) -> list[float]:
    """Return probabilities, computed in float64, for logits of one dimension."""
    powers = np.exp(logits.astype(np.float64) - float(logits.max()))
    probabilities: list[float] = (powers / powers.sum()).tolist()
    return probabilities


def text_probabilities(
    first: NDArray[Any], following: Iterable[NDArray[Any]], texts: list[list[int]]
) -> list[float]:
    """Return the softmax over the texts' mean log-probabilities. `first`: the logits after the
    prompt, [vocabulary]; `following`: for each text those after its tokens, all but the last, at
    the least, [tokens, vocabulary]."""
    scores = []
    for text, rest in zip(texts, following, strict=True):
        logits = np.concatenate((first[None], rest[: len(text) - 1]))
        most = logits.max(-1)
        norms = most + np.log(np.exp(logits - most[:, None]).sum(-1))
        scores.append((logits[np.arange(len(text)), text] - norms).mean())
    return softmax(np.array(scores))


def peak_mib() -> float:
    """Return the most resident memory that this process has held so far, in MiB; see
    evaluation/scoring_process.py, which .venv-peers does not have."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run(job: Job) -> dict[str, Any]:
    """Load the contestant, ask the warm-up rows and then all rows, and return the figures."""
    started = time.perf_counter()
    contestant = CONTESTANTS[job["contestant"]](job["settings"], job["threads"], job["files"])
    load_s = time.perf_counter() - started
    ask, rows = getattr(contestant, job["method"]), job["rows"]
    ask(rows[: job["warm_up"]])
    began, processor = time.perf_counter(), time.process_time()
    answers = ask(rows)
    seconds = time.perf_counter() - began
    done = len(rows)
    if job["method"] == "generate":
        done = sum(map(len, answers))
    return {
        "speed": done / seconds,
        "load_s": load_s,
        "cores_busy": (time.process_time() - processor) / seconds,
        "rss_mb": peak_mib(),
        "answers": answers,
    }


if __name__ == "__main__":
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))), flush=True)
