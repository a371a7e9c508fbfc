"""What a script can see of itself while it trains, in a thread that outlives it, and in its exit handlers."""

import atexit
import inspect
import json
import os
import pickle
import sys
import threading
import time

from training import steps


class Kept:
    pass


def is_picklable():
    return type(pickle.loads(pickle.dumps(Kept()))) is Kept and sys.modules["__main__"].__dict__.get("Kept") is Kept


def outlive():
    time.sleep(0.3)
    print("late thread", is_picklable(), steps(3), threading.main_thread().is_alive())


def leave():
    print("exit handler", is_picklable(), __name__, steps(2), threading.active_count())


atexit.register(leave)
print("loss", steps(20))
print(
    json.dumps(
        {
            "argv": sys.argv,
            "orig_argv": sys.orig_argv[1:],
            "file": __file__,
            "spec": str(__spec__),
            "loader": type(__loader__).__name__,
            "keys": sorted(key for key in globals() if key.startswith("__")),
            "path": sys.path,
            "source": len(inspect.getsource(Kept)),
            "depth": len(inspect.stack()),
            "threads": threading.active_count(),
            "hooks": [sys.excepthook is sys.__excepthook__, sys.displayhook is sys.__displayhook__, sys.gettrace()],
            "signals": [str(__import__("signal").getsignal(number)) for number in (2, 15)],
            "name": os.path.basename(sys.executable),
        }
    )
)
threading.Thread(target=outlive, name="late").start()
raise SystemExit(int(sys.argv[1]))
