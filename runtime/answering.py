"""A conversation in, an answer out: joins the engine, the prompt format and the sampler.

Takes `Load` and `Reply` commands, emits events, all in the calling thread. It knows nothing of processes: worker.py
carries commands and events between processes, and only `stop` may be called from another thread.
"""

import time
from collections.abc import Callable
from math import inf

from runtime.calling import Calling, calling
from runtime.engine import Engine
from runtime.errors import EngineError
from runtime.events import (
    CallPiece,
    Drafts,
    Drawn,
    Event,
    Finished,
    Likelihood,
    Load,
    Loaded,
    LoadProgress,
    Notice,
    Piece,
    PromptProgress,
    Reply,
    StopReason,
)
from runtime.library import file_bytes
from runtime.logprobs import log_probabilities
from runtime.memory_watch import resident_bytes
from runtime.native import has_amx_kernels
from runtime.native_context import AbortedError
from runtime.obituary import rebuild
from runtime.pace import Pace
from runtime.prompts import Prompter, prompter

_TELL_SECONDS = 0.03

Emit = Callable[[Event], None]


class Answerer:
    """A loaded model and its prompt format."""

    def __init__(self, engine: Engine, prompts: Prompter, drafts: Drafts = "always") -> None:
        """`drafts` says for which answers the engine may guess, if it can."""
        self._engine, self._prompts, self._drafts = engine, prompts, drafts
        self._told: set[str] = set()  # notices

    @classmethod
    def load(cls, load: Load, emit: Emit, cancelled: Callable[[], bool]) -> "Answerer":
        """Open the model, emitting progress and `Loaded`. Raises UserError; `cancelled` ends the load with one."""
        started = time.monotonic()
        last = -1.0
        pace: Pace | None = None  # the first call comes when the headers are read and the weights begin

        def progress(fraction: float) -> bool:
            nonlocal last, pace
            if pace is None:
                pace = Pace(n_bytes, fraction * n_bytes)
            if fraction - last >= 0.01 or fraction == 1:
                last = fraction
                emit(LoadProgress(fraction, *pace.at(fraction * n_bytes)))
            return not cancelled()

        n_bytes = file_bytes(load.path) if load.path.is_file() else 0
        engine = Engine(load.path, load.settings, progress)
        try:
            if cancelled():  # while the context was made, which tells no progress
                raise EngineError("loading was cancelled")
            prompts = prompter(
                load.prompt, engine.vocabulary, template=engine.chat_template(), tokenizer=load.tokenizer
            )
        except BaseException:
            engine.close()
            raise
        if load.settings.use_extra_bufts and has_amx_kernels():
            emit(
                Notice(
                    "llama-cpp-python holds AMX code, which GCC 12 miscompiles, so the model runs without weight "
                    f"repacking, which is slower; `{rebuild()}` builds one without it"
                )
            )
        if prompts.marks_turns_by_text:
            emit(
                Notice(
                    f"the prompt format of this model ({load.prompt}) tells turns apart by plain text, so that a "
                    "message, or a file put into one, can pretend to be several"
                )
            )
        info = engine.info()
        emit(
            Loaded(
                description=info.description,
                tensor_bytes=info.tensor_bytes,
                n_params=info.n_params,
                n_ctx=engine.n_ctx,
                n_ctx_train=info.n_ctx_train,
                n_vocab=engine.vocabulary.n_tokens,
                seconds=time.monotonic() - started,
                has_calls=prompts.calls is not None,
            )
        )
        return cls(engine, prompts, load.settings.drafts)

    def reply(self, reply: Reply, emit: Emit) -> None:
        """Answer, emitting progress, pieces and `Finished`. Raises UserError; what was read stays in the KV cache."""
        started = time.monotonic()
        ids = self._prompts.encode(reply.messages, reply.tools)
        plan = calling(reply, self._prompts.calls if reply.tools else None, ids, self._engine.vocabulary)
        ids = [*ids, *plan.opening]
        for notice in plan.notices:
            if notice not in self._told:
                self._told.add(notice)
                emit(Notice(notice))
        reused = 0
        pace: Pace | None = None

        def progress(done: int, total: int, kept: int) -> None:
            nonlocal reused, pace
            reused = kept
            pace = pace or Pace(total, done)
            emit(PromptProgress(done, total, kept, *pace.at(done)))

        reason: StopReason = "stopped"
        n_answer, sampling, first = 0, "", None
        try:
            self._engine.read(ids, progress)
            answering = time.monotonic()
            drafting = reply.sampling.seed is None and (reply.sampling.temperature > 0 or self._drafts == "always")
            grammar = plan.grammars.get(plan.reader.place, reply.grammar)
            sampling = self._engine.start_sampling(reply.sampling, grammar, drafting=drafting, forbidden=plan.forbidden)
            reason, n_answer, first = self._draw(reply, plan, emit)
        except AbortedError:  # while the prompt was read
            answering = time.monotonic()
        calls = plan.reader.calls(plan.check)
        if calls and not plan.opening:
            sampling = f"in calls grammar → {sampling}"
        emit(
            Finished(
                reason="calls" if calls and reason == "end" else reason,
                prompt_tokens=len(ids),
                reused_tokens=reused,
                answer_tokens=n_answer,
                prompt_seconds=answering - started,
                answer_seconds=time.monotonic() - answering,
                context_used=self._engine.context_used,
                n_ctx=self._engine.n_ctx,
                sampling=sampling,
                first_token_seconds=first - started if first is not None else None,
                memory_bytes=resident_bytes(),
                gpu_bytes=self._engine.gpu_bytes(),
                drafted_tokens=self._engine.n_drafted,
                accepted_tokens=self._engine.n_accepted,
                calls=calls,
            )
        )
        self._engine.keep()  # nobody waits for it

    def _draw(self, reply: Reply, plan: Calling, emit: Emit) -> tuple[StopReason, int, float | None]:
        """Draw tokens until the answer ends; why it did, how many there were, and when the first was drawn."""
        engine, vocabulary, reader = self._engine, self._engine.vocabulary, plan.reader
        # SentencePiece writes the space before the first word into its token; an answer does not begin with a space.
        last = reply.messages[-1]
        goes_on = last.role == "assistant" and bool(last.content.strip())
        strip_first = vocabulary.is_spm and not goes_on and reply.grammar is None  # it says itself how to begin
        reason: StopReason | None = None
        n_answer = 0
        teller = _Teller(emit)
        first: float | None = None

        while reason is None:
            token = engine.next()
            first = first or time.monotonic()
            ends = vocabulary.ends_answer(token)
            piece = b"" if ends else vocabulary.piece(token, strip_space=strip_first and n_answer == 0)
            if reply.logprobs is not None:
                teller.drawn.append(self._likelihoods(token, piece, reply.logprobs))
            if ends:
                reason = "end"
                break
            n_answer += 1
            before = reader.place
            teller.tell(reader.read(token, piece, n_answer), n_answer)
            if reader.place == "calls":
                teller.flush()
            if reader.place != before:
                begun = reader.behind_opening if reader.place == "calls" else ""
                engine.hold_to(plan.grammars.get(reader.place), begun)
            if n_answer == reply.sampling.max_tokens:
                reason = "length"
            elif not engine.has_room():
                reason = "context"
            else:
                try:
                    engine.extend(token)
                except AbortedError:
                    reason = "stopped"
        teller.tell(reader.finish(n_answer), n_answer)
        teller.flush()
        return reason, n_answer, first

    def _likelihoods(self, token: int, piece: bytes, n_top: int) -> Drawn:
        """How likely the token was that was just drawn; `piece` is what it adds to the answer."""
        own, top = log_probabilities(self._engine.logits(), token, n_top)
        vocabulary = self._engine.vocabulary
        likeliest = (Likelihood(id_, vocabulary.piece(id_, special=True), logprob) for id_, logprob in top)
        return Drawn(Likelihood(token, piece, own), tuple(likeliest))

    def stop(self, wanted: bool = True) -> None:
        """End the reply in progress, or allow the next one. May be called from any thread."""
        self._engine.abort(wanted)

    def close(self) -> None:
        self._engine.close()


class _Teller:
    """Emits what an answer adds: calls at once, text no more often than anybody can see.

    An event costs a tenth of a millisecond here and as much where it is heard: of a small model's token much.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._text, self._n_tokens = "", 0
        self._told = -inf
        self.drawn: list[Drawn] = []
        """Log-probabilities since the last piece."""

    def tell(self, parts: list[str | CallPiece], n_tokens: int) -> None:
        """What the `n_tokens`th token added."""
        self._n_tokens = n_tokens
        for part in parts:
            if isinstance(part, CallPiece):
                self.flush()
                self._emit(part)
            else:
                self._text += part
        if self._text and time.monotonic() - self._told >= _TELL_SECONDS:
            self.flush()

    def flush(self) -> None:
        """What is not told yet."""
        if self._text or self.drawn:
            self._emit(Piece(self._text, self._n_tokens, tuple(self.drawn)))
            self._text, self._told = "", time.monotonic()
            self.drawn.clear()
