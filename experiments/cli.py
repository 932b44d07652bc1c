"""What every launcher shares: a user's mistake is one screen of text and a non-zero exit status."""

import errno
import functools
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags

from distill.loop import DivergedError, Stopped
from moe.errors import InputError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
# A path that cannot be what it was given as: --workdir under a file, --json at a folder.
_NO_SUCH_PATH = (
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
# 128 and the number of SIGINT, as shells have it.
_INTERRUPTED = 130
_TOLD = (*_NO_SPACE, *_NO_ACCESS, *_NO_SUCH_PATH)


def run(main: Callable[..., None], *, commands: Sequence[str] = ()) -> None:
    """Parses the flags, runs `main`, and exits.

    Args:
        main: does the work; it is given the command where there are any.
        commands: one of them must stand in the command line, without dashes; where there are none,
            nothing may.

    Exit status: 0 when done, or asked to stop and saved; 1 for a failure that is nobody's typo (no
    space, a diverged run); 2 for input that must be changed; 130 when interrupted. Anything else is
    a bug and keeps its traceback.
    """
    app.run(
        lambda argv: _guarded(functools.partial(main, *argv[1:])),
        flags_parser=functools.partial(_parse, commands),
    )


def required(flag: flags.FlagHolder[Any]) -> Any:
    """Returns the value of a flag that has no default."""
    if not flag.value:
        raise InputError(
            f'--{flag.name}=PATH is required. {flags.FLAGS[flag.name].help} See --help.'
        )
    return flag.value


def _guarded(main: Callable[[], None]) -> int:
    try:
        main()
    except Stopped as stopped:
        _say(f'Stopped as asked, {stopped}. The same command goes on from there.')
    except DivergedError as error:
        _say(f'Error: {error}')
        return 1
    except OSError as error:
        # An error that is an InputError besides has words of its own.
        if not isinstance(error, InputError) and error.errno not in _TOLD:
            raise
        _say(f'Error: {error if isinstance(error, InputError) else _system_text(error)}')
        return 1
    except InputError as error:
        _say(f'Error: {error}')
        return 2
    except KeyboardInterrupt:
        _say('Interrupted. What was complete is intact.')
        return _INTERRUPTED
    return 0


def _system_text(error: OSError) -> str:
    """Says what the operating system refused, and the remedy."""
    what = error.filename or 'a file'
    if error.errno in _NO_ACCESS:
        return (
            f'{what} must be accessible; the system says: {error.strerror}. Change its '
            'permissions, or choose another path.'
        )
    if error.errno in _NO_SUCH_PATH:
        return (
            f'{what} cannot be used; the system says: {error.strerror}. Check --workdir and the '
            'other paths that were given.'
        )
    return (
        f'no space left to write {what} ({error.strerror}). What was complete is intact. Free some '
        'space, or choose another --workdir, and run the same command again.'
    )


def _parse(commands: Sequence[str], argv: Sequence[str]) -> list[str]:
    """Parses flags; a config file or an override that fails is a message, not a traceback."""
    try:
        _tell_of_shared_flags(argv[0])
        rest = flags.FLAGS(argv)
        for name in flags.FLAGS:
            # What stands for a config file that could not be read raises at any attribute.
            getattr(flags.FLAGS[name].value, 'items', None)
    except Exception as error:
        _say(_flag_text(error))
        sys.exit(2)
    if commands and (len(rest) == 1 or rest[1] not in commands):
        received = repr(rest[1]) if len(rest) > 1 else 'none'
        _say(
            f'Error in the command line: name one of {", ".join(commands)}; received {received}. '
            'See --help.'
        )
        sys.exit(2)
    surplus = rest[2:] if commands else rest[1:]
    if surplus:
        _say(
            f'Error in the command line: {surplus[0]!r} is no flag. Flags are --name=value; lists '
            'have commas and no spaces; quote what the shell would split. See --help.'
        )
        sys.exit(2)
    return rest


def _tell_of_shared_flags(command: str) -> None:
    """Makes --help list those that a command has from other files of this package, too."""
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith('experiments.'):
            for flag in defined:
                flags.FLAGS.register_key_flag_for_module(command, flag)


def _flag_text(error: Exception) -> str:
    """Says what is wrong in the config file, with its line, or else in the command line."""
    for cause in _chain(error):
        if isinstance(cause, SyntaxError):
            return f'Error in {cause.filename}, line {cause.lineno}: {cause.msg}\n{cause.text}'
        frames = [f for f in traceback.extract_tb(cause.__traceback__) if _is_users(f.filename)]
        if frames:
            return (
                f'Error in {frames[-1].filename}, line {frames[-1].lineno}: {_text(cause)}\n'
                f'    {frames[-1].line}\nconfigs/base.py has every key, with its type.'
            )
    return (
        f'Error in the command line: {_text(error)}\nSee --help for flags, configs/base.py for the '
        'keys that --config.KEY=VALUE can set.'
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_users(filename: str) -> bool:
    """Whether code is neither a library's nor this module's."""
    names = ('stdlib', 'platstdlib', 'purelib', 'platlib')
    libraries = [sysconfig.get_path(name) for name in names]
    return not filename.startswith(('<', __file__, *libraries))


def _text(error: BaseException) -> str:
    """The words of an error; some arrive as a KeyError that another one was raised with."""
    argument = error.args[0] if error.args else type(error).__name__
    if isinstance(argument, KeyError):
        return f'there is no key {_text(argument)}'
    if isinstance(error, OSError):
        # A list of where the file was looked for, the reason last.
        return str(error).splitlines()[-1].strip()
    return str(argument)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
