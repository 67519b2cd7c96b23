"""Find what a model fails on: a proposer learns to write queries that the target gets wrong, round by round.

Reach for it to turn an evaluation into training data: the failures found are answered well and the target is tuned on
them. «Forewarned is Forearmed» (ReverseGen, October 2024). Departures: warm-up and repair use AdamW where the paper has
RMSprop; the preference step may be anchored by the likelihood of the preferred queries (``nll_weight``), without which
it collapses in small runs; a judge gets all sampled answers of a query at once; SemDeDup is the cluster cap of
``training_set``.
"""

import collections
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import datasets
import numpy as np
import polars as pl

from downriver.core import (
    Budget,
    DownriverError,
    InputError,
    atomic_write,
    derive_seed,
    fingerprint,
    generator,
    unknown,
)
from downriver.data.synth.diversity import near_duplicates, ngram_vectors, self_bleu
from downriver.data.synth.dpo import dpo, sft
from downriver.models import ChatModel, HFChat, Model, load

Responses = tuple[str, ...]
Target = Model | ChatModel | Callable[[list[str]], list[str]]
Pairing = Literal["zip", "same_prompt", "nearest"]
DPO: dict[str, Any] = {"beta": 0.1, "learning_rate": 5e-5, "nll_weight": 0.0, "batch_size": 8, "budget": "1 epoch"}
SCHEMA = {
    "prompt": pl.String,
    "query": pl.String,
    "key": pl.String,
    "status": pl.String,
    "response": pl.String,
    "score": pl.Float64,
    "reference": pl.String,
}
NEAREST_AT_ONCE = 1000


class FailureResult(NamedTuple):
    """What a judge says of one query: did the target fail (``None``: the judge cannot tell, and the query counts
    neither way), how badly, and the right answer where the judge knows it."""

    failed: bool | None
    score: float = math.nan
    reference: str = ""


class Judge(Protocol):
    """Judges queries with the target's answers. Attributes ``samples`` (default 1: one greedy answer) and
    ``temperature`` (default 1 for several) say what the target is asked for."""

    def __call__(self, answered: list[tuple[str, Responses]], /) -> Sequence[FailureResult]: ...


@dataclass(frozen=True)
class FewShotPrompt:
    """Prompts of a few numbered examples after a header, to be continued by one more.

    ``examples`` is the pool; every prompt shows ``k`` of them (3, the paper's). With ``k=0`` the prompt is the bare
    header, which may be empty.

    >>> FewShotPrompt(["Why?", "How?"], k=1).prompts(1, np.random.default_rng(0))
    ['Ask questions:\\n1. How?\\n2.']
    """

    examples: Sequence[str]
    header: str = "Ask questions:"
    k: int = 3

    def __post_init__(self) -> None:
        if self.k < 0 or len(self.examples) < self.k:
            raise InputError(f"k is {self.k} and there are {len(self.examples)} examples: at least k are expected")

    @property
    def stop(self) -> str | None:
        """What ends a proposal beside the end of text."""
        return "\n" if self.k else None

    def prompts(self, n: int, rng: np.random.Generator) -> list[str]:
        """``n`` prompts, each of other examples drawn without replacement."""
        return [
            self._write(rng.choice(len(self.examples), self.k, replace=False)) if self.k else self.header
            for _ in range(n)
        ]

    def continuation(self, query: str) -> str:
        """The text that follows a prompt when the query is proposed."""
        return f" {query}\n" if self.k else query

    def lessons(self, rng: np.random.Generator) -> list[tuple[str, str]]:
        """Every example as the continuation of a prompt of others: what the warm-up learns from."""
        found = []
        for i, example in enumerate(self.examples):
            others = np.delete(np.arange(len(self.examples)), i)
            shown = rng.choice(others, min(self.k, len(others)), replace=False)
            found.append((self._write(shown) if self.k else self.header, self.continuation(example)))
        return found

    def _write(self, shown: Sequence[int] | np.ndarray) -> str:
        lines = [f"{place}. {self.examples[i]}" for place, i in enumerate(shown, start=1)]
        return "\n".join([self.header, *lines, f"{len(lines) + 1}."])


@dataclass(frozen=True)
class Round:
    """One round: ``proposals`` (prompt, query, key, status, response, score, reference) and its figures.

    ``status`` is ``failed``, ``passed``, ``undecided``, ``invalid``, ``duplicate`` or ``unasked``. ``figures``:
    proposed; validity (share of the proposals); unique (distinct share of the valid ones); self_bleu (of up to 1000
    valid ones); answered; failed; failure_rate (share of the answered); calls (answers paid for); pairs; seconds.
    """

    number: int
    proposals: pl.DataFrame
    figures: Mapping[str, float]
    rolled_back: bool = False


@dataclass(frozen=True)
class Exploration:
    """What a loop has found: its rounds, the last sound proposer, and why it ended."""

    rounds: tuple[Round, ...]
    proposer: Model | ChatModel
    stopped: str
    seed: int = 0

    def frame(self) -> pl.DataFrame:
        """The figures, one row a round."""
        return pl.DataFrame(
            [{"round": r.number, **r.figures, "rolled_back": r.rolled_back} for r in self.rounds],
            infer_schema_length=None,
        )

    def training_set(
        self,
        *,
        only_failures: bool = True,
        rounds: Literal["all", "last"] | Sequence[int] = "all",
        dedup: bool = True,
        max_per_cluster: int | None = None,
        clusters: int = 5,
        embed: Callable[[list[str]], np.ndarray] | None = None,
    ) -> datasets.Dataset:
        """The queries found: query, key, response, reference, score, failed, round, and cluster where there is a cap.

        ``rounds`` are numbers from 1. ``dedup`` keeps the first of equal queries. ``max_per_cluster`` caps the share
        of any one kind: of each of ``clusters`` k-means clusters (5, the paper's) of ``embed`` (default: counts of
        character n-grams) that many queries are kept, drawn by the loop's seed. Rounds that were rolled back give
        nothing. Raises ``InputError`` for a round that was not run, and where texts were withheld on disk.
        """
        by_number = {r.number: r for r in self.rounds if not r.rolled_back}
        if isinstance(rounds, str):
            if rounds not in ("all", "last"):
                raise unknown("rounds", rounds, ("all", "last"))
            wanted = list(by_number)[-1:] if rounds == "last" else list(by_number)
        else:
            wanted = list(rounds)
        for number in wanted:
            if number not in by_number:
                raise unknown("round", number, by_number)
        states = ["failed"] if only_failures else ["failed", "passed"]
        parts = [by_number[n].proposals.with_columns(round=pl.lit(n, dtype=pl.Int64)) for n in wanted]
        empty = pl.DataFrame(schema={**SCHEMA, "round": pl.Int64})
        table = pl.concat([empty, *parts]).filter(pl.col("status").is_in(states))
        if table["query"].null_count():
            raise InputError("texts of this exploration were withheld on disk: take the training set where it was run")
        if dedup:
            table = table.unique("key", keep="first", maintain_order=True)
        table = table.with_columns(failed=pl.col("status") == "failed").drop("prompt", "status")
        if max_per_cluster is not None:
            table = self._capped(table, max_per_cluster, clusters, embed or ngram_vectors)
        return datasets.Dataset(table.to_arrow())

    def _capped(self, table: pl.DataFrame, cap: int, clusters: int, embed: Callable[[list[str]], Any]) -> pl.DataFrame:
        from sklearn.cluster import KMeans

        if cap < 1 or clusters < 1:
            raise InputError(f"max_per_cluster {cap}, clusters {clusters}: both are at least 1")
        if table.height <= clusters:
            return table.with_columns(cluster=pl.int_range(pl.len()))
        kmeans = KMeans(clusters, random_state=self.seed, n_init=1)
        found = kmeans.fit_predict(embed(table["query"].to_list()))
        order = generator("cluster caps", self.seed).permutation(table.height)
        shuffled = table.with_columns(cluster=pl.Series(found, dtype=pl.Int64), place=pl.Series(order))
        return shuffled.filter(pl.col("place").rank("ordinal").over("cluster") <= cap).drop("place")


@dataclass(frozen=True)
class FailureExplorer:
    """The loop: propose, keep the valid and new, ask the target, judge, pair failed with passed, prefer, again.

    Parameters
    ----------
    proposer
        A causal ``Model`` that has been warmed up (``warm_up``), or a ``ChatModel`` (one round: it cannot be trained).
    target
        A causal ``Model`` (asked through its chat template where it has one), a ``ChatModel``, or a function from
        queries to answers.
    judge
        See ``downriver.data.synth.judges``, or any function of ``[(query, answers)]`` to ``FailureResult`` each.
    prompt_builder
        ``FewShotPrompt`` or what has its ``prompts``, ``continuation`` and ``stop``.
    validity
        Which queries make sense, a function of texts. An invalid query is no failure: the target never sees it.
    dedup
        ``("minhash", .78)``, the paper's: near-copies within and across rounds are dropped before they are asked.
        ``None`` keeps repeats (a query is still paid for once).
    pairs
        ``zip``: failed and passed queries, shuffled, side by side, the paper's; ``same_prompt``: only those proposed
        after one prompt (give ``per_prompt``); ``nearest``: every failed query with the likest passed one.
    rounds, n_per_round, temperature, top_p, max_tokens
        The paper's: about 3 of 10 000 at temperature 1, top-p 0.9 to 0.98, 512 new tokens.
    dpo
        Of ``beta``, ``learning_rate``, ``nll_weight``, ``batch_size``, ``budget`` those that differ from 0.1, 5e-5, 0,
        8, one epoch.
    target_calls
        The answers of the target that may be paid for, over all rounds and resumptions.
    min_validity
        The collapse guard: a round with fewer valid proposals (default: half) ends the loop before the target is
        asked, and the proposer of the round before is given back.
    withhold
        Texts that must not lie on disk: ``True`` for all, or a function that says which queries; of those only
        hashes are kept.

    ``run(folder)`` keeps every round on disk and continues a run that was ended: a round is made from the files of
    the one before, and no answer and no verdict is asked for twice.

    Example
    -------
    >>> from downriver.models import small
    >>> from downriver.data.synth.judges import ExactMatch
    >>> loop = FailureExplorer(small("causal-lm", "nano"), lambda queries: [str(len(q) % 2) for q in queries],
    ...     ExactMatch(lambda queries: ["0" for q in queries]), FewShotPrompt((), "", k=0),
    ...     rounds=1, n_per_round=8, max_tokens=4, dedup=None)
    >>> state = loop.run()
    >>> state.frame()["proposed"].to_list(), state.stopped
    ([8], '1 round done')
    """

    proposer: Model | ChatModel
    target: Target
    judge: Judge
    prompt_builder: FewShotPrompt
    validity: Callable[[list[str]], Sequence[bool]] | None = None
    dedup: tuple[str, float] | None = ("minhash", 0.78)
    pairs: Pairing = "zip"
    rounds: int = 3
    n_per_round: int = 10_000
    dpo: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    top_p: float = 0.98
    max_tokens: int = 512
    answer_tokens: int = 512
    per_prompt: int = 1
    target_calls: int | None = None
    min_validity: float = 0.5
    withhold: bool | Callable[[list[str]], Sequence[bool]] = False
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "n_per_round", "max_tokens", "answer_tokens", "per_prompt", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: at least 1 is expected")
        if self.target_calls is not None and self.target_calls < 1:
            raise InputError(f"target_calls is {self.target_calls}: at least 1, or None for no limit, is expected")
        if not 0 <= self.min_validity <= 1:
            raise InputError(f"min_validity is {self.min_validity}: a share from 0 to 1 is expected")
        if self.pairs not in get_args(Pairing):
            raise unknown("way to pair", self.pairs, get_args(Pairing))
        if self.dedup is not None and (self.dedup[0] != "minhash" or not 0 < self.dedup[1] <= 1):
            raise InputError(f"dedup is {self.dedup}: ('minhash', a Jaccard similarity above 0 and up to 1) or None")
        for name in self.dpo:
            if name not in DPO:
                raise unknown("parameter of dpo", name, DPO)
        if isinstance(self.proposer, ChatModel) and self.rounds > 1:
            raise InputError(
                f"{self.proposer!r} cannot be trained: rounds=1, or a causal Model as proposer, is expected"
            )

    def run(self, resume: str | os.PathLike[str] | None = None) -> Exploration:
        """Run the rounds that are not in the folder ``resume`` yet (default: a folder that is thrown away).

        Ends early, saying why in ``stopped``, when the target fails on none or on all of a round's queries, when the
        budget of calls is spent and when the collapse guard fires. Raises ``InputError`` when the folder holds a run
        with other settings, ``DownriverError`` when the judge breaks down (verdicts so far are kept).
        """
        if resume is None:
            with tempfile.TemporaryDirectory() as scratch:
                return self._run(Path(scratch))
        return self._run(Path(resume))

    def _run(self, folder: Path) -> Exploration:
        self._claim(folder)
        responses, verdicts = _Log(folder / "responses.jsonl"), _Log(folder / "verdicts.jsonl")
        done: list[Round] = []
        proposers: list[Model | ChatModel] = [self.proposer]
        stopped = f"{self.rounds} round{'s' * (self.rounds != 1)} done"
        for number in range(1, self.rounds + 1):
            if number > 1:
                proposers.append(self._next(proposers[-1], done[-1], folder / f"round-{number:02d}" / "proposer"))
            found = self._read(folder, number) or self._explore(
                number, proposers[-1], done, responses, verdicts, folder
            )
            done.append(found)
            if why := self._end(found):
                stopped = why
                break
        proposer = proposers[-2] if done[-1].rolled_back and len(proposers) > 1 else proposers[-1]
        return Exploration(tuple(done), proposer, stopped, self.seed)

    def _explore(
        self,
        number: int,
        proposer: Model | ChatModel,
        done: Sequence[Round],
        responses: "_Log",
        verdicts: "_Log",
        folder: Path,
    ) -> Round:
        started = time.perf_counter()
        table = self._propose(number, proposer)
        queries = table["query"].to_list()
        table = table.with_columns(key=pl.Series([_key(q) for q in queries], dtype=pl.String))
        valid = np.array([bool(q) for q in queries])
        if self.validity is not None and valid.any():
            said = list(self.validity([q for q, ok in zip(queries, valid, strict=True) if ok]))
            if len(said) != valid.sum():
                raise InputError(f"validity gave {len(said)} answers for {valid.sum()} queries: one each is expected")
            valid[valid] = np.asarray(said, dtype=bool)
        status = np.where(valid, "unasked", "invalid").astype(object)
        validity = float(valid.mean())
        rolled_back = validity < self.min_validity
        if not rolled_back:
            if self.dedup is not None:
                seen = [q for r in done for q in _kept(r) if q is not None]
                places = np.flatnonzero(valid)
                copies = near_duplicates([queries[i] for i in places], seen, self.dedup[1])
                status[places[copies]] = "duplicate"
            paid = self._ask(number, table, status, responses, verdicts)
        else:
            paid = 0
        table = table.with_columns(status=pl.Series(status.tolist(), dtype=pl.String))
        table = self._with_verdicts(table, responses, verdicts)
        distinct = table.filter(pl.Series(valid))["key"]
        failed, passed = (int((table["status"] == s).sum()) for s in ("failed", "passed"))
        answered = failed + passed
        pairs = len(self._pair(table, number))
        figures = {
            "proposed": len(queries),
            "validity": validity,
            "unique": distinct.n_unique() / max(1, len(distinct)),
            "self_bleu": self_bleu(table.filter(pl.Series(valid))["query"].to_list()[:1000]),
            "answered": answered,
            "failed": failed,
            "failure_rate": failed / answered if answered else math.nan,
            "calls": paid,
            "pairs": pairs,
            "seconds": time.perf_counter() - started,
        }
        self._write(folder, number, table, figures, rolled_back)
        return Round(number, table, figures, rolled_back)

    def _propose(self, number: int, proposer: Model | ChatModel) -> pl.DataFrame:
        builder, seed = self.prompt_builder, derive_seed("explore", self.seed, number)
        prompts = builder.prompts(
            math.ceil(self.n_per_round / self.per_prompt), generator("prompts", self.seed, number)
        )
        chat = _chat(proposer, self.batch_size, "text")
        times = collections.Counter(prompts)
        rows: list[dict[str, str]] = []
        for count in sorted(set(times.values())):  # equal prompts are asked as one, for that many samples
            asked = [prompt for prompt, n in times.items() if n == count]
            answers = chat.generate(
                asked,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                stop=builder.stop,
                seed=seed,
                n=count * self.per_prompt,
            )
            rows += [
                {"prompt": p, "query": a.text.strip()} for p, some in zip(asked, answers, strict=True) for a in some
            ]
        return pl.DataFrame(rows[: self.n_per_round], schema={"prompt": pl.String, "query": pl.String})

    def _ask(self, number: int, table: pl.DataFrame, status: np.ndarray, responses: "_Log", verdicts: "_Log") -> int:
        """Have what is new answered and judged, piece by piece, each piece kept as soon as it is there."""
        samples = getattr(self.judge, "samples", 1)
        fresh = dict(
            zip(
                table["key"].filter(pl.Series(status == "unasked")),
                table["query"].filter(pl.Series(status == "unasked")),
                strict=True,
            )
        )
        fresh = {key: query for key, query in fresh.items() if key not in verdicts.rows}
        if self.target_calls is not None:
            left = max(0, self.target_calls - samples * len({*responses.rows, *verdicts.rows})) // samples
            unpaid = [key for key in fresh if key not in responses.rows][left:]
            for key in unpaid:
                del fresh[key]
        keys, paid = list(fresh), 0
        for start in range(0, len(keys), 4 * self.batch_size):
            piece = keys[start : start + 4 * self.batch_size]
            missing = [key for key in piece if key not in responses.rows]
            if missing:
                hidden = self._hidden([fresh[key] for key in missing])
                for key, answers, hide in zip(
                    missing, self._answers([fresh[key] for key in missing], samples), hidden, strict=True
                ):
                    responses.put(key, {"responses": answers}, None if hide else {"responses": answers})
                paid += samples * len(missing)
            answered = [(fresh[key], tuple(responses.rows[key]["responses"])) for key in piece]
            try:
                found = list(self.judge(answered))
            except DownriverError:
                raise
            except Exception as error:
                raise DownriverError(
                    f"round {number}: the judge broke down after {len(verdicts.rows)} verdicts ({type(error).__name__}:"
                    f" {error}); answers and verdicts are kept: run it again on the same folder"
                ) from error
            if len(found) != len(piece):
                raise InputError(f"the judge gave {len(found)} verdicts for {len(piece)} queries: one each is expected")
            for key, query, result in zip(piece, (q for q, _ in answered), found, strict=True):
                row = result._asdict()
                verdicts.put(key, row, row | {"reference": ""} if self._hidden([query])[0] else row)
        return paid

    def _answers(self, queries: list[str], samples: int) -> list[list[str]]:
        if not isinstance(self.target, Model | ChatModel):
            rounds = [self.target(queries) for _ in range(samples)]
            if any(len(answers) != len(queries) for answers in rounds):
                raise InputError(
                    f"the target gave {len(rounds[0])} answers for {len(queries)} queries: one each is expected"
                )
            return [list(answers) for answers in zip(*rounds, strict=True)]
        temperature = getattr(self.judge, "temperature", 1.0) if samples > 1 else 0.0
        found = _chat(self.target, self.batch_size, None).generate(
            queries, max_tokens=self.answer_tokens, temperature=temperature, seed=self.seed, n=samples
        )
        return [[answer.text for answer in answers] for answers in found]

    def _with_verdicts(self, table: pl.DataFrame, responses: "_Log", verdicts: "_Log") -> pl.DataFrame:
        rows = []
        words = {True: "failed", False: "passed", None: "undecided"}
        for row in table.iter_rows(named=True):
            verdict = verdicts.rows.get(row["key"]) if row["status"] == "unasked" else None
            if verdict is not None:
                row["status"] = words[verdict["failed"]]
                row |= {"score": verdict["score"], "reference": verdict["reference"]}
                row["response"] = (responses.rows.get(row["key"], {}).get("responses") or [None])[0]
            rows.append(row)
        return pl.DataFrame(rows, schema=SCHEMA)

    def _pair(self, table: pl.DataFrame, number: int) -> list[tuple[str, str, str]]:
        """(prompt, failed query, passed query): at most as many as there are of the rarer kind."""
        rng = generator("pairs", self.seed, number)
        rows = [row for row in table.iter_rows(named=True) if row["status"] in ("failed", "passed")]
        rows = [rows[i] for i in rng.permutation(len(rows))]
        groups: dict[str, list[list[dict[str, Any]]]] = {}
        for row in rows:
            group = groups.setdefault(row["prompt"] if self.pairs == "same_prompt" else "", [[], []])
            group[row["status"] == "passed"].append(row)
        if self.pairs == "nearest":
            found = [pair for failed, passed in groups.values() for pair in _nearest(failed, passed)]
        else:
            found = [pair for group in groups.values() for pair in zip(*group, strict=False)]
        write = self.prompt_builder.continuation
        return [(f["prompt"], write(f["query"]), write(p["query"])) for f, p in found]

    def _next(self, proposer: Model | ChatModel, last: Round, folder: Path) -> Model:
        """The proposer of the next round: from disk, or trained on the pairs of the last."""
        if folder.exists():
            return load(folder, kind="causal-lm")
        assert isinstance(proposer, Model)
        settings = DPO | dict(self.dpo)
        trained = dpo(
            proposer,
            self._pair(last.proposals, last.number),
            seed=derive_seed("dpo", self.seed, last.number),
            **settings,
        )
        trained.save(folder)
        return trained

    def _end(self, found: Round) -> str:
        """Why the loop ends here, in words; empty when it goes on."""
        figures, number = found.figures, found.number
        if found.rolled_back:
            share = f"round {number}: {figures['validity']:.0%} of the proposals are valid"
            if number == 1:
                return f"{share}: warm the proposer up longer, or look at the validity filter"
            return (
                f"{share}: the proposer collapsed and is rolled back to that of round {number - 1}; lower the learning"
                " rate, or anchor it with dpo={'nll_weight': 1}"
            )
        if (found.proposals["status"] == "unasked").any():
            return f"round {number}: the budget of {self.target_calls} target calls is spent"
        if not figures["answered"]:
            return f"round {number}: no new valid query to ask: loosen dedup or validity"
        if figures["failure_rate"] == 0:
            return (
                f"round {number}: the target failed on none of {figures['answered']:.0f} queries, so there is nothing"
                " to prefer: propose more, warm up on harder queries, or trust the target here"
            )
        if figures["failure_rate"] == 1:
            return (
                f"round {number}: the target failed on all {figures['answered']:.0f} queries, so there is nothing to"
                " prefer them to: check the judge and the references, or warm up on easier queries"
            )
        if not figures["pairs"] and number < self.rounds:
            return f"round {number}: no prompt has both a failed and a passed query: raise per_prompt, or pair by zip"
        return ""

    def _hidden(self, queries: list[str]) -> Sequence[bool]:
        return [self.withhold] * len(queries) if isinstance(self.withhold, bool) else list(self.withhold(queries))

    def _claim(self, folder: Path) -> None:
        """Write down what this loop is, or make sure that the folder's is the same; more rounds may be asked for."""
        proposer, builder = self.proposer, self.prompt_builder
        asked = {
            "proposer": weights_hash(proposer) if isinstance(proposer, Model) else repr(proposer),
            "prompts": fingerprint(list(builder.examples), builder.header, builder.k),
            "dpo": DPO | dict(self.dpo),
            "dedup": list(self.dedup) if self.dedup else None,
            **{
                name: getattr(self, name)
                for name in (
                    "pairs",
                    "n_per_round",
                    "temperature",
                    "top_p",
                    "max_tokens",
                    "answer_tokens",
                    "per_prompt",
                )
            },
            **{name: getattr(self, name) for name in ("min_validity", "seed")},
        }
        asked["dpo"]["budget"] = str(asked["dpo"]["budget"])
        file = folder / "loop.json"
        if not file.exists():
            if folder.exists() and any(folder.iterdir()):
                raise InputError(f"{folder} is not empty and holds no exploration: choose another folder")
            with atomic_write(file, "w") as out:
                json.dump(asked, out, indent=1)
            return
        known = json.loads(file.read_text(encoding="utf-8"))
        for name, value in asked.items():
            if known.get(name) != value:
                raise InputError(
                    f"{folder} holds an exploration with {name} {known.get(name)!r}, and {value!r} is asked for: choose"
                    " another folder"
                )

    def _write(
        self, folder: Path, number: int, table: pl.DataFrame, figures: Mapping[str, float], rolled_back: bool
    ) -> None:
        hidden = pl.Series(list(self._hidden(table["query"].to_list())), dtype=pl.Boolean)
        bare = [pl.when(~hidden).then(pl.col(name)).alias(name) for name in ("query", "response", "reference")]
        with atomic_write(folder / f"round-{number:02d}" / "proposals.parquet") as file:
            table.with_columns(bare).write_parquet(file)
        with atomic_write(folder / f"round-{number:02d}" / "round.json", "w") as file:
            said = {"figures": dict(figures), "rolled_back": rolled_back, "target_calls": self.target_calls}
            json.dump(said, file, indent=1)

    def _read(self, folder: Path, number: int) -> Round | None:
        """A finished round from disk. One whose texts were withheld and are needed is made again: equal seeds give
        equal proposals, and the verdicts are there."""
        here = folder / f"round-{number:02d}"
        if not (here / "round.json").exists():
            return None
        table = pl.read_parquet(here / "proposals.parquet")
        said = json.loads((here / "round.json").read_text(encoding="utf-8"))
        withheld = number < self.rounds and table["query"].null_count()
        more_to_spend = (table["status"] == "unasked").any() and said["target_calls"] != self.target_calls
        if withheld or more_to_spend:
            return None
        return Round(number, table, said["figures"], said["rolled_back"])


def warm_up(
    proposer: Model,
    prompt_builder: FewShotPrompt,
    budget: Budget | str = "1 epoch",
    *,
    learning_rate: float = 5e-7,
    batch_size: int = 8,
    seed: int = 0,
) -> Model:
    """A copy of a base model that has learnt to continue few-shot prompts: every example of the pool after others.

    One epoch at 5e-7 in batches of 8 are the paper's (for models of 3B to 8B; a small one needs far more).

    >>> from downriver.models import small
    >>> builder = FewShotPrompt(["why?", "how?", "who?", "when?"], "Ask:", k=2)
    >>> warm_up(small("causal-lm", "nano"), builder, batch_size=4).kind
    'causal-lm'
    """
    lessons = prompt_builder.lessons(generator("warm up", seed))
    return sft(
        proposer, lessons, budget, learning_rate=learning_rate, batch_size=batch_size, seed=seed, name="examples"
    )


def improve(
    target: Model,
    data: datasets.Dataset | Sequence[str],
    answerer: Callable[[list[str]], list[str]] | None = None,
    *,
    replay: Sequence[tuple[str, str]] = (),
    budget: Budget | str = "1 epoch",
    learning_rate: float = 5e-5,
    batch_size: int = 8,
    seed: int = 0,
) -> Model:
    """A copy of the target tuned on good answers to the queries of ``data`` (a ``training_set``, or texts).

    ``answerer`` gives the answers: reference solutions, refusals, a stronger model; a ``training_set`` whose judge
    left a ``reference`` for every query needs none. ``replay`` mixes in (query, answer) rows of what must not be
    forgotten. Queries are put into the model's chat template where it has one. 5e-5, batches of 8 and one epoch are
    the paper's.

    Raises ``InputError`` when there are no queries, or no answers to them.

    >>> from downriver.models import small
    >>> tuned = improve(small("causal-lm", "nano"), ["1+1="], lambda queries: ["2"], batch_size=2, learning_rate=1e-2)
    >>> tuned.kind
    'causal-lm'
    """
    rows = data if isinstance(data, datasets.Dataset) else None
    queries = list(rows["query"]) if rows is not None else list(data)
    if not queries:
        raise InputError("data hold no query: explore further, or loosen the filters of training_set")
    if answerer is not None:
        answers = list(answerer(queries))
    elif rows is not None and "reference" in rows.column_names and all(rows["reference"]):
        answers = list(rows["reference"])
    else:
        raise InputError("an answerer is missing: a function from queries to good answers is expected")
    if len(answers) != len(queries):
        raise InputError(f"the answerer gave {len(answers)} answers to {len(queries)} queries: one each is expected")
    asked: list[Any] = [*queries, *(query for query, _ in replay)]
    if getattr(target.processor, "chat_template", None):
        asked = [[{"role": "user", "content": query}] for query in asked]
    lessons = list(zip(asked, [*answers, *(answer for _, answer in replay)], strict=True))
    return sft(target, lessons, budget, learning_rate=learning_rate, batch_size=batch_size, seed=seed, name="data")


def weights_hash(model: Model) -> str:
    """Twenty hexadecimal digits of the names and values of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:20]


class _Log:
    """Rows by key, appended to a file as they come; a torn last line counts as absent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {row.pop("key"): row for row in _lines(path)}
        self.torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")

    def put(self, key: str, row: dict[str, Any], on_disk: dict[str, Any] | None) -> None:
        """Keep a row; what goes to disk may say less, or nothing."""
        self.rows[key] = row
        if on_disk is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self.torn + json.dumps({"key": key, **on_disk}) + "\n")
        self.torn = False


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _nearest(
    failed: list[dict[str, Any]], passed: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """One-to-one pairs of the greatest total likeness, block by block."""
    from scipy.optimize import linear_sum_assignment

    blocks = max(1, math.ceil(max(len(failed), len(passed)) / NEAREST_AT_ONCE))
    for block in range(blocks):
        mine, others = failed[block::blocks], passed[block::blocks]
        if mine and others:
            vectors = ngram_vectors([row["query"] for row in mine + others])
            likeness = (vectors[: len(mine)] @ vectors[len(mine) :].T).toarray()
            for i, j in zip(*linear_sum_assignment(-likeness), strict=True):
                yield mine[i], others[j]


def _kept(found: Round) -> list[str | None]:
    return found.proposals.filter(pl.col("status").is_in(["failed", "passed", "undecided", "unasked"]))[
        "query"
    ].to_list()


def _chat(model: Model | ChatModel, batch_size: int, strings: Any) -> ChatModel:
    return HFChat(model, batch_size=batch_size, strings=strings, progress=False) if isinstance(model, Model) else model


def _key(query: str) -> str:
    return hashlib.sha256(query.encode()).hexdigest()[:24]
