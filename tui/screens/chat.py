"""The chat: a transcript, a composer and what stands around them.

Takes a `Talker` and a `History` and holds the path of turns that is shown. The talker's generators run in threads,
which post what they give; the history is used from the screen's own thread alone.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.screen import Screen
from textual.widgets import Footer, Markdown

from runtime.errors import UserError, WorkerDiedError
from runtime.events import Finished, Loaded, LoadProgress, Notice, Piece, PromptProgress, Sampling, Silent
from runtime.sampling import describe
from runtime.tool_loop import Called, Calling, Told
from runtime.tools import Result, Toolbox
from tui.history import History, Turn
from tui.screens.approval import ApprovalScreen
from tui.screens.conversations import ConversationsScreen
from tui.screens.keys import CHAT_BINDINGS, KeysScreen
from tui.screens.live import UNSAVED, GrowingAnswer, LiveAnswer, with_results
from tui.screens.states import CALLING, NOT_NOW, RELOAD, State, load_figures, prompt_figures, silence
from tui.screens.system_prompt import SystemPromptScreen
from tui.screens.threads import ApprovalWanted, LoadNews, ReplyNews, TalkerThreads
from tui.talker import Speaker, Talker, messages_for
from tui.widgets.composer import Composer
from tui.widgets.lines import ProgressLine, StatusLine, TitleLine
from tui.widgets.printable import one_line, printable
from tui.widgets.transcript import WINDOW, Transcript
from tui.widgets.turns import AnswerTurn


class ChatScreen(Screen[None]):
    """One conversation at a time with one talker."""

    BINDINGS: ClassVar[list[BindingType]] = CHAT_BINDINGS

    def __init__(
        self,
        talker: Talker,
        history: History,
        *,
        speaker: Speaker,
        notice: str | None,
        system: str | None,
        presets: Mapping[str, Sampling],
        preset: str,
        conversation: int | None,
        toolbox: Toolbox | None,
        max_rounds: int,
    ) -> None:
        super().__init__()
        self._talker = TalkerThreads(talker, self, toolbox, max_rounds)
        self._history = history
        self._speaker = speaker
        self._notice = notice
        self._default_system = self._system = system
        self._presets = presets
        self._preset = preset
        self._conversation = conversation
        self._path: list[Turn] = []
        """The turns shown, first to last, without an answer that still grows."""
        self._editing = False
        """The saved path goes on where the shown one was cut off to edit a message."""
        self._growing: GrowingAnswer | None = None
        self._calling: AnswerTurn | None = None  # the last turn's, whose calls are carried out and perhaps answered
        self._state = State.DOWN
        self._silent = False  # the title says that the engine gives no sign of life
        self._n_ctx: int | None = None

    def compose(self) -> ComposeResult:
        name = " · ".join(filter(None, [self._speaker.title, self._speaker.level]))
        yield TitleLine(name)
        yield Transcript(self._speaker, self._notice)
        yield ProgressLine()
        yield Composer(placeholder="Write a message")
        yield StatusLine()
        yield Footer(show_command_palette=False, compact=True)

    async def on_mount(self) -> None:
        self.query_one(StatusLine).show_preset(self._preset)
        self.query_one(Composer).focus()
        await self._show(self._conversation)
        self.action_reload()

    def on_unmount(self) -> None:
        """Whatever ends the program, what was said stays. Nobody is left to approve a call."""
        self._talker.stop()
        if self._growing is not None:
            try:
                self._growing.live.stop = "stopped"
                self._growing.live.save()
            except UserError as error:
                self.app.exit(return_code=1, message=Text(str(error)))

    # The state

    @property
    def _answering(self) -> bool:
        return self._growing is not None or self._calling is not None

    def _enter(self, state: State, words: str | None = None) -> None:
        """Go to `state` and show it, in `words` of its own if there are any."""
        self.query_one(TitleLine).show(words or state.value)
        if state is not self._state:
            self._state = state
            self.refresh_bindings()

    def check_action(self, action: str, _parameters: tuple[object, ...]) -> bool | None:
        """Offer only what the state allows; hidden keys do nothing."""
        match action:
            case "stop":
                return self._state in (State.ANSWERING, State.LOADING) or self._editing
            case "new" | "conversations" | "system" | "preset":
                return not self._answering
            case "again":
                return self._state is State.READY and bool(self._path) and not self._editing
            case "edit":
                return not self._answering and bool(self._path) and not self._editing
            case "reload":
                return self._state is State.DOWN
        return True

    # Loading

    def on_fault_chosen(self) -> None:
        if self._state is State.DOWN:
            self.action_reload()

    def action_reload(self) -> None:
        self._enter(State.LOADING)
        self._talker.load()

    async def on_load_news(self, news: LoadNews) -> None:
        progress = self.query_one(ProgressLine)
        match news.event:
            case LoadProgress(fraction) as loading:
                self._enter(self._state)
                progress.show("Loading the model", fraction, load_figures(loading))
            case Notice(text):
                await self.query_one(Transcript).add_notice(text)
            case Silent(seconds):
                self._enter(self._state, silence(seconds))
            case Loaded() as loaded:
                progress.hide()
                await self.query_one(Transcript).remove_faults()
                self._n_ctx = loaded.n_ctx
                self.query_one(StatusLine).clear(loaded.n_ctx)
                self._enter(State.READY)
                self.query_one(Composer).focus()
            case UserError() as error:
                progress.hide()
                self._enter(State.DOWN)
                await self.query_one(Transcript).add_fault(str(error), RELOAD)

    # Asking and answering

    async def on_composer_sent(self, sent: Composer.Sent) -> None:
        composer, transcript = self.query_one(Composer), self.query_one(Transcript)
        if self._state is not State.READY:
            composer.restore(sent.text)
            self._hint(NOT_NOW[self._state])
            return
        try:
            if self._conversation is None:
                self._conversation = self._history.create(model=self._speaker.model, system=self._system)
            turn = self._history.append(self._conversation, self._tip, "user", sent.text)
        except UserError as error:
            composer.restore(sent.text)
            await self._fault(error)
            return
        self._editing = False
        if transcript.n_turns >= 2 * WINDOW:
            await transcript.show(self._path, self._system)
        self._path.append(turn)
        await transcript.add(turn)
        await self._answer()

    @property
    def _tip(self) -> int | None:
        """The last turn of the path that could be saved."""
        return next((turn.id for turn in reversed(self._path) if turn.id != UNSAVED), None)

    async def _answer(self) -> None:
        """Have the talker answer the path, which ends with the user."""
        await self._begin()
        self._enter(State.ANSWERING)
        self._talker.reply(messages_for(self._system, self._path), self._presets[self._preset])

    async def _begin(self) -> None:
        """An answer begins to grow behind the path."""
        assert self._conversation is not None  # a path is in a conversation
        live = LiveAnswer(self._history, self._conversation, self._tip, self._speaker)
        widget = await self.query_one(Transcript).add_growing(live.turn)
        self._growing, self._calling = GrowingAnswer(live, widget, self, self._fault), None

    async def on_reply_news(self, news: ReplyNews) -> None:
        if self._growing is None and isinstance(news.event, PromptProgress | Piece | Finished):
            await self._begin()  # what was called is answered
        growing = self._growing
        match news.event:
            case PromptProgress() as reading:
                self._enter(self._state, prompt_figures(reading))
            case Piece() as piece:
                assert growing is not None
                if growing.live.n_tokens == 0 or self._silent:
                    self._silent = False
                    self._enter(self._state)
                growing.hear(piece)
            case Notice(text):
                await self.query_one(Transcript).add_notice(text)
            case Silent(seconds):
                self._silent = True
                self._enter(self._state, silence(seconds))
            case Finished() as finished:
                assert growing is not None
                await self._finish(growing, finished)
            case Calling():
                self._enter(self._state, CALLING)
            case Called() as called:
                await self._show_results({called.call.id: called.result}, waits=True)
            case Told():
                await self._show_results({}, waits=False)
            case UserError() as error:
                if growing is not None:
                    await self._end(growing)
                self._calling = None
                died = isinstance(error, WorkerDiedError)
                self._enter(State.DOWN if died else State.READY)
                await self._fault(error, RELOAD if died else None)

    async def on_reply_ended(self) -> None:
        if self._calling is not None:  # it was stopped there
            self._calling = None
            self._enter(State.READY)

    async def _finish(self, growing: GrowingAnswer, finished: Finished) -> None:
        """The answer, or a part of it that ends in calls, is complete."""
        growing.live.end(finished)
        await self._end(growing)
        status = self.query_one(StatusLine)
        status.show_answer(
            growing.live.n_tokens,
            growing.live.tokens_per_second,
            finished.first_token_seconds,
            finished.accepted_tokens,
        )
        status.show_context(finished.context_used, finished.n_ctx)
        if finished.calls:
            self._calling = growing.widget
        else:
            self._enter(State.READY)

    async def _end(self, growing: GrowingAnswer) -> None:
        """Keep what was said of an answer that ended, in whatever way."""
        await growing.end()
        self._growing = None
        if growing.is_something:
            self._path.append(growing.live.turn)
        elif growing.live.stop == "end":
            self._hint("The model had nothing to say.")

    async def _show_results(self, results: Mapping[str, Result], *, waits: bool) -> None:
        """Results of the last turn's calls, by the calls' ids, have come; `waits`: others have not."""
        assert self._calling is not None
        turn = self._path[-1] = with_results(self._path[-1], results)
        self._calling.show_calls(turn, waits=waits)
        if turn.id != UNSAVED and results:
            await self._write(lambda: self._history.update(turn))

    async def on_approval_wanted(self, wanted: ApprovalWanted) -> None:
        self.app.push_screen(ApprovalScreen(wanted.call), lambda answer: wanted.answer.put(answer or "no"))

    # What the keys do

    async def action_stop(self) -> None:
        """Stop the answer or the load; else give up editing."""
        if self._answering or self._state is State.LOADING:
            self._enter(State.STOPPING)
            self._talker.stop()
        elif self._editing:
            await self._show(self._conversation)

    async def action_interrupt(self) -> None:
        if self._answering or self._state is State.LOADING:
            await self.action_stop()
        elif text := self.query_one(Composer).selected_text or self.get_selected_text():
            self._copy(text)
        else:
            self._hint("Ctrl+Q quits.")

    def action_copy_answer(self) -> None:
        answer = next((turn.content for turn in reversed(self._path) if turn.role == "assistant"), None)
        if answer is None:
            self._hint("There is no answer to copy yet.")
        else:
            self._copy(answer)

    def on_markdown_link_clicked(self, event: Markdown.LinkClicked) -> None:
        self._copy(printable(event.href))

    async def action_again(self) -> None:
        """Answer the last message once more; the old answer stays in the history, on a branch of its own."""
        old = None
        while self._path and self._path[-1].role == "assistant":  # with the turns before that called tools
            old = self._path.pop()
        if old is not None:
            await self.query_one(Transcript).remove_from(old)
        await self.query_one(Transcript).remove_faults()
        await self._answer()

    async def action_edit(self) -> None:
        """Take the last message back into the composer. Sent, it begins a branch; Escape leaves all as it was."""
        index = max(index for index, turn in enumerate(self._path) if turn.role == "user")
        turn = self._path[index]
        await self.query_one(Transcript).remove_from(turn)
        del self._path[index:]
        self._editing = True
        self.refresh_bindings()
        self.query_one(Composer).restore(turn.content)

    async def action_new(self) -> None:
        await self._show(None)

    @work
    async def action_conversations(self) -> None:
        chosen = await self.app.push_screen_wait(ConversationsScreen(self._history))
        try:
            saved = {conversation.id for conversation in self._history.conversations()}
        except UserError as error:
            await self._fault(error)
            return
        if chosen is not None:
            await self._show(chosen)
        elif self._conversation is not None and self._conversation not in saved:
            await self._show(None)

    @work
    async def action_system(self) -> None:
        text = await self.app.push_screen_wait(SystemPromptScreen(self._system or ""))
        if text is None:
            return
        self._system = text or None
        self.query_one(Transcript).show_system(self._system)
        if (conversation := self._conversation) is not None:
            await self._write(lambda: self._history.set_system(conversation, self._system))

    def action_preset(self) -> None:
        """Go to the next sampling preset; it holds from the next answer on."""
        names = list(self._presets)
        self._preset = names[(names.index(self._preset) + 1) % len(names)]
        self.query_one(StatusLine).show_preset(self._preset)
        self._hint(f"{self._preset}: {describe(self._presets[self._preset])}")

    def action_scroll(self, where: str) -> None:
        getattr(self.query_one(Transcript), f"scroll_{where}")(animate=False)

    def action_keys(self) -> None:
        self.app.push_screen(KeysScreen())

    # What the others share

    async def _show(self, conversation: int | None) -> None:
        """Go to a saved conversation, or begin one."""
        system, path = self._default_system, []
        if conversation is not None:
            try:
                system, path = self._history.conversation(conversation).system, self._history.messages(conversation)
            except UserError as error:
                await self._fault(error)
                return
        if self._editing:
            self.query_one(Composer).clear()
        self._conversation, self._system, self._path, self._editing = conversation, system, path, False
        await self.query_one(Transcript).show(path, system)
        self.query_one(StatusLine).clear(self._n_ctx)
        self.query_one(Composer).focus()
        self.refresh_bindings()

    async def _write(self, write: Callable[[], None]) -> None:
        """Change the history, or show why it cannot be."""
        try:
            write()
        except UserError as error:
            await self._fault(error)

    async def _fault(self, error: UserError, remedy: str | None = None) -> None:
        await self.query_one(Transcript).add_fault(str(error), remedy)

    def _hint(self, text: str) -> None:
        self.notify(text, markup=False, timeout=3)

    def _copy(self, text: str) -> None:
        self.app.copy_to_clipboard(text)
        self._hint(f"Copied: {one_line(text)[:40]}")
