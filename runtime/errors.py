"""The errors a user can cause or must act on.

    UserError                 one line for the user: what is wrong and what to do
    ├── CatalogueError        models.yaml or a name looked up in it
    ├── CheckpointError       a safetensors folder that cannot be read
    ├── ModelFileError        a GGUF file that cannot be used
    ├── OutputError           a file that cannot be written
    ├── EngineError           the engine refused: memory, settings, prompt too long
    ├── GrammarError          a grammar or JSON schema that no answer can be held to
    └── WorkerDiedError       the engine's process ended by itself

A floor adds children of its own beside what raises them: quant's for texts, results and base logits, tui's for the
conversation store.

Only the command line catches `UserError`: it prints the message on one line of stderr and exits with 1. Everything
else that is raised is a bug and shows its traceback. A message carries both numbers where two disagree, and ends with
what to do.
"""


class UserError(Exception):
    """A fault outside the program, told in one line that says what is wrong and what to do."""


class CatalogueError(UserError):
    """models.yaml, or a model, level or preset looked up in it."""


class CheckpointError(UserError):
    """A safetensors folder that is missing, incomplete, damaged or of a kind Bise does not convert."""


class ModelFileError(UserError):
    """A GGUF file that is missing, cut off, or not one llama.cpp can load."""


class OutputError(UserError):
    """A result that could not be written: disk full, no permission, or something else already there."""


class EngineError(UserError):
    """The engine refused a request and is still usable: out of memory, prompt longer than the context, bad settings."""


class GrammarError(UserError):
    """A grammar or JSON schema that is not one, or that Bise cannot hold an answer to."""


class WorkerDiedError(UserError):
    """The process that held the engine ended without being asked to, by a signal of that number if any."""

    def __init__(self, message: str, signal: int | None = None) -> None:
        super().__init__(message)
        self.signal = signal
