"""Waits for torch in a program that `gradctl run` has started, and in its Python children; then lets gradctl listen.

The interpreter itself imports this file, because its folder is on PYTHONPATH. It stands alone: the standard library
only, in the syntax that every Python understands, since a child may be an older interpreter. It takes its folder off
`sys.path`, gives way to the `sitecustomize` that it hides, and does nothing in an interpreter of another version.
"""

# ruff: noqa: UP031, RUF005  (an old interpreter must be able to read this: no annotations either)
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportFunctionMemberAccess=false

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
_RUN = os.environ.get("GRADCTL_RUN", "")


def _says(key, value):
    """Whether GRADCTL_RUN holds that value; a quote inside one of its strings is escaped, so this cannot be fooled."""
    return '"%s": %s,' % (key, value) in _RUN


def _quoted(text):
    return '"%s"' % text.replace("\\", "\\\\").replace('"', '\\"')


_OURS = _says("site", _quoted(_HERE))
_PATHS = []  # sys.path as it was before the script began
_NOTED = []  # why this process cannot be recorded
_MAIN = _OURS and _says("main_pid", os.getpid())
_WHO = "the program" if _MAIN else "a Python child"


class _WaitForTorch(object):  # noqa: UP004  (an old interpreter needs it)
    """A finder that knows one name, `torch`, and only wraps the loader that the other finders find for it."""

    def find_spec(self, name, path=None, target=None):
        """Find the spec of torch as the finders after this one do; None for every other name."""
        if name != "torch":
            return None
        finders = list(sys.meta_path)
        if self in finders:
            finders = finders[finders.index(self) + 1 :]
        for finder in finders:
            find = getattr(finder, "find_spec", None)
            spec = None if find is None else find(name, path, target)
            if spec is not None:
                self._wrap(spec.loader)
                return spec
        return None

    def _wrap(self, loader):
        plain = getattr(loader, "exec_module", None)
        if plain is None or isinstance(loader, type):
            return

        def exec_module(module):
            plain(module)
            attach(loader)

        def attach(loader):
            loader.__dict__.pop("exec_module", None)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _attach()

        # Tracebacks and warnings of torch's own import must not show a frame that plain Python does not have.
        exec_module.__code__ = exec_module.__code__.replace(co_filename="<frozen importlib._bootstrap>")
        try:
            loader.exec_module = exec_module
        except (AttributeError, TypeError):
            _not_seen(_WHO, "torch is loaded by %s, which cannot be followed" % type(loader).__name__)


def _attach():
    """Let gradctl listen to the torch that has just been imported; a fault of ours stays ours."""
    try:
        import importlib.util

        package = os.path.dirname(os.path.dirname(_HERE))
        try:
            spec = importlib.util.find_spec("gradctl")
        except ValueError:  # a module of that name without a spec
            spec = None
        if spec is None:
            sys.path.append(os.path.dirname(package))
            try:
                from gradctl._run import _attach
            finally:
                sys.path.remove(os.path.dirname(package))
        elif os.path.realpath(spec.origin or "") != os.path.realpath(os.path.join(package, "__init__.py")):
            _not_seen(_WHO, "it finds another gradctl: %s" % spec.origin)
            return
        else:
            from gradctl._run import _attach
        _attach.attach(_RUN, _Leaving)
    except KeyboardInterrupt:
        raise  # it was meant for the program
    except BaseException as fault:
        _not_seen(_WHO, "gradctl could not listen: %s: %s" % (type(fault).__name__, fault))


def _not_seen(what, why):
    """Leave a line for the report about what could not be recorded."""
    _NOTED.append(why)
    try:
        import json

        path = os.path.join(json.loads(_RUN)["out"], "not_seen.jsonl")
        if not os.path.exists(path) or os.path.getsize(path) < 65536:
            line = (json.dumps([what, why]) + "\n").encode("utf-8")
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
    except Exception:  # the run directory is gone, or full: there is nobody left to tell
        return


class _Leaving(object):  # noqa: UP004
    """Rides on the SystemExit of `sys.exit` and notices whether it ended the process or was caught."""

    alive = 0
    ended = None

    def __init__(self, status):
        self.code = status
        _Leaving.alive += 1

    def __del__(self, frame=sys._getframe, no_frame=ValueError):
        _Leaving.alive -= 1
        try:
            frame(1)
        except no_frame:  # the interpreter itself has let go of the exception: it is going down
            _Leaving.ended = (self.code,)

    def __reduce__(self):
        return (bool, ())

    @staticmethod
    def status():
        """What ends the process, in a tuple; an empty one if that cannot be told; None without `sys.exit`."""
        return _Leaving.ended if _Leaving.ended is not None else () if _Leaving.alive else None


def _watch_exit():
    """Note the status that `sys.exit` is given in the main thread, for the report."""
    plain, main = sys.exit, _thread_id()

    def exit(*status):
        try:
            plain(*status)
        except SystemExit as error:
            if _thread_id() == main:
                error.gradctl = _Leaving(error.code)
            raise

    exit.__doc__ = plain.__doc__
    exit.__module__ = "sys"
    exit.__qualname__ = "exit"
    exit.plain = plain
    sys.exit = exit


def _thread_id():
    import _thread

    return _thread.get_ident()


def _at_exit():
    """End the main process: the report is drawn by gradctl, unless torch was never imported."""
    if not _says("main_pid", os.getpid()):
        return  # a forked child
    # A script's own `types.py` or `nt.py` must not be taken for a module of the standard library that we import here.
    paths, sys.path[:] = sys.path[:], [os.path.dirname(os.path.dirname(os.path.dirname(_HERE)))] + _PATHS
    try:
        import json

        from gradctl._run import _at_exit as at_exit

        at_exit.main_process_ends(json.loads(_RUN), _Leaving.status())
    except BaseException as fault:
        _not_seen("the report", "gradctl could not draw it: %s: %s" % (type(fault).__name__, fault))
        if _says("quiet", "false") and _says("rank", 0):
            try:
                os.write(2, ("gradctl: nothing was recorded: %s\n" % _NOTED[0]).encode("utf-8", "replace"))
            except OSError:
                return  # closed: nobody is listening
    finally:
        sys.path[:] = paths


def _start():
    if _HERE in sys.path:
        sys.path.remove(_HERE)
    sys.path_importer_cache.pop(_HERE, None)
    _PATHS[:] = sys.path
    if not _OURS:
        return
    if not _says("python", '"%d.%d"' % sys.version_info[:2]):
        _not_seen(_WHO, "it is Python %d.%d, another than that of the program" % sys.version_info[:2])
        return
    if _MAIN:
        import atexit

        atexit.register(_at_exit)
        _watch_exit()
    if "torch" in sys.modules:  # a .pth file has imported it
        _attach()
    else:
        sys.meta_path.insert(0, _WaitForTorch())


try:
    _start()
except BaseException as fault:
    _not_seen(_WHO, "gradctl could not start: %s: %s" % (type(fault).__name__, fault))

# Give way to the sitecustomize that is hidden by this one; if there is none, or it is broken, `site` reports that as if
# this file did not exist.
sys.modules.pop("sitecustomize", None)
import sitecustomize  # noqa: E402, F401
