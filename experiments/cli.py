"""What every launcher shares: a user's mistake is one screen of text and a non-zero exit status."""

import errno
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from distill.loop import DivergedError, Stopped
from moe.errors import InputError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(main: Callable[[], None]) -> None:
    """Parses the flags, runs `main`, and exits.

    Exit status: 0 when done, or asked to stop and saved; 1 for a failure that is nobody's typo (no
    space, a diverged run); 2 for input that must be changed. Anything else is a bug and keeps its
    traceback.
    """
    app.run(lambda _: _guarded(main), flags_parser=_parse)


def _guarded(main: Callable[[], None]) -> int:
    try:
        main()
    except Stopped as stopped:
        _say(f'Stopped as asked, saved at step {stopped.step}. The same command goes on from it.')
    except InputError as error:
        _say(f'Error: {error}')
        return 2
    except DivergedError as error:
        _say(f'Error: {error}')
        return 1
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        _say(
            f'Error: no space left to write {error.filename or "a file"} ({error.strerror}). What '
            'was complete is intact. Free some space, or choose another --workdir, and run the '
            'same command again.'
        )
        return 1
    return 0


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; an override that the config refuses is a message, not a traceback."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = str(error.args[0]) if error.args else str(error)
        _say(f'Error in the command line: {text}\nSee --help for flags, configs/base.py for keys.')
        sys.exit(2)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
