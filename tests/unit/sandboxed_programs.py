"""Programs for the sandbox: some with the tests that they pass (FINE), and some that try to cheat or to do harm."""

FINE = {
    "imports": """
        import math, random, re, collections, itertools, heapq, bisect

        def f(x):
            return math.floor(x)
        ---
        assert f(3.5) == 3
    """,
    "a main part": """
        def f(x):
            return x
        if __name__ == "__main__":
            raise SystemExit
        ---
        assert f(3.5) == 3.5
    """,
    "values": """
        def f(x):
            return x
        ---
        for x in [0, -1, 1.5, True, None, "é\\ud800", b"x", 1 << 5000, -(1 << 70), 1j]:
            assert f(x) == x
        assert f({"a": [(1, {2}), frozenset({3})], 4: {}}) == {"a": [(1, {2}), frozenset({3})], 4: {}}
    """,
    "odd floats": """
        def f():
            return float("inf"), float("nan"), -0.0
        ---
        infinite, none, zero = f()
        assert infinite == float("inf")
        assert none != none
        assert str(zero) == "-0.0"
    """,
    "kinds of numbers": """
        import numpy
        from decimal import Decimal
        from fractions import Fraction
        def f():
            return Fraction(1, 2), Decimal("0.5"), numpy.float64(0.5), numpy.int64(3)
        ---
        assert f() == (0.5, 0.5, 0.5, 3)
    """,
    "kinds of collections": """
        from collections import Counter, namedtuple
        def f():
            return Counter("aab"), {1: 2}.keys(), namedtuple("P", "x y")(1, 2)
        ---
        assert f() == ({"a": 2, "b": 1}, {1}, (1, 2))
    """,
    "an iterator": """
        def f(n):
            yield from range(n)
        ---
        assert list(f(3)) == [0, 1, 2]
        assert 2 in f(3)
    """,
    "a match": """
        import re
        def f(text):
            return re.match("a", text)
        ---
        assert f("ab")
        assert not f("b")
        assert f("ab").start() == 0
    """,
    "a class": """
        class Pair:
            def __init__(self, a, b):
                self.a, self.b = a, b
        def f(pairs):
            return sum(pair.a for pair in pairs)
        ---
        assert f([Pair(1, 2), Pair(a=3, b=4)]) == 4
    """,
    "an exception": """
        def f(x):
            raise ValueError("bad")
        ---
        try:
            f(1)
        except ValueError as error:
            assert str(error) == "bad"
        else:
            assert False
    """,
    "a file of its own": """
        def f():
            open("a", "w").write("x" * 1000)
            return open("a").read()
        ---
        assert f() == "x" * 1000
    """,
    "a thread": """
        import threading
        def f():
            thread = threading.Thread(target=print)
            thread.start()
            thread.join()
            return 1
        ---
        assert f() == 1
    """,
}

HOSTILE = {
    "exit": """
        import os
        os._exit(0)
    """,
    "exit when called": """
        import os
        def add(a, b):
            os._exit(0)
    """,
    "SystemExit": "raise SystemExit(0)",
    "SystemExit when called": """
        def add(a, b):
            raise SystemExit(0)
    """,
    "sys.exit in a thread": """
        import threading, os
        threading.Timer(0.1, os._exit, [0]).start()
        import time
        def add(a, b):
            time.sleep(1)
    """,
    "fake pass on stdout": """
        print('null\\n"ready"\\nnull\\npassed\\nOK')
        import sys
        sys.stdout.flush()
        raise SystemExit(0)
    """,
    "fake pass on every file": """
        import os
        for fd in range(256):
            try:
                os.write(fd, b'"ready"\\nnull\\nnull\\n')
            except OSError:
                pass
        os._exit(0)
    """,
    "fake frames": """
        import os, json, struct
        data = json.dumps(["value", None]).encode()
        for fd in range(3, 256):
            for _ in range(100):
                try:
                    os.write(fd, struct.pack(">I", len(data)) + data)
                except OSError:
                    break
        def add(a, b):
            return 0
    """,
    "a frame without end": """
        import os
        for fd in range(3, 256):
            try:
                os.write(fd, b"\\xff" * 1000)
            except OSError:
                pass
        def add(a, b):
            return 0
    """,
    "a deep frame": """
        import os, struct
        data = b'["value", ' + b"[" * 5000000
        for fd in range(3, 256):
            try:
                os.write(fd, struct.pack(">I", len(data)) + data)
            except OSError:
                pass
    """,
    "a huge value": """
        def add(a, b):
            return 'x' * (100 << 20)
    """,
    "an answer that cannot be read": """
        import json, os, struct
        data = json.dumps(["value", {"x" * (60 << 20): 1}]).encode()
        data = struct.pack(">I", len(data)) + data
        for fd in range(3, 256):
            try:
                while data:
                    data = data[os.write(fd, data):]
            except OSError:
                pass
    """,
    "equal to everything": """
        class Any:
            def __eq__(self, other):
                return True
            def __ne__(self, other):
                return False
            def __hash__(self):
                return 0
        def add(a, b):
            return Any()
    """,
    "an int equal to everything": """
        class Any(int):
            def __eq__(self, other):
                return True
            def __hash__(self):
                return 0
        def add(a, b):
            return Any(7)
    """,
    "patches builtins": """
        import builtins
        builtins.AssertionError = builtins.Exception = SystemExit
        builtins.isinstance = lambda *a: True
        def add(a, b):
            return 0
    """,
    "patches its own side": """
        import rayllm.eval.sandbox.wire as wire
        import rayllm.eval.sandbox.program as program
        import rayllm.eval.sandbox.judge as judge
        judge.judge = lambda *a, **k: None
        program._Program.answer = lambda *a: ["value", {"ref": 0}]
        wire.encode = program.encode = lambda *a: True
        def add(a, b):
            return 0
    """,
    "looks for the tests in its memory": """
        import gc, sys, re, glob
        def search():
            texts = [repr(o) for o in gc.get_objects() if isinstance(o, (str, dict, list, tuple))]
            frame = sys._getframe()
            while frame:
                texts.append(repr(frame.f_locals) + repr(frame.f_globals))
                frame = frame.f_back
            for path in glob.glob("/proc/*/mem") + glob.glob("/proc/*/environ") + glob.glob("/proc/*/fd/*"):
                try:
                    texts.append(open(path, errors="replace").read(1 << 20))
                except Exception:
                    pass
            return re.findall(r"== (\\d+)", " ".join(texts).split("assert add", 1)[-1])
        def add(a, b):
            return int((search() or ["0"])[0])
    """,
    "reads its parent's memory": """
        import os, re
        def memory(pid):
            found = b""
            for line in open(f"/proc/{pid}/maps"):
                low, high = (int(x, 16) for x in line.split()[0].split("-"))
                if " r" in line:
                    with open(f"/proc/{pid}/mem", "rb") as file:
                        try:
                            file.seek(low)
                            found += b"".join(re.findall(rb"assert add.*", file.read(high - low)))
                        except (OSError, OverflowError):
                            pass
            return found
        def add(a, b):
            for pid in (os.getppid(), 1):
                if b"== 3" in memory(pid): return a + b
    """,
    "kills its parent": """
        import os
        os.kill(os.getppid(), 9)
        os.kill(1, 9)
    """,
    "kills everybody": """
        import os
        os.kill(-1, 9)
    """,
    "kills its group": """
        import os
        os.killpg(0, 9)
    """,
    "kills by a file's owner": """
        import fcntl, os
        r, w = os.pipe()
        fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())
    """,
    "traces its parent": """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.ptrace(16, os.getppid(), 0, 0):
            raise OSError
    """,
    "forks": """
        import os
        if os.fork() == 0:
            os.setsid()
            while True:
                pass
        def add(a, b):
            return a + b
    """,
    "forks by number": """
        import ctypes
        libc = ctypes.CDLL(None)
        if libc.syscall(57) < 0 and libc.syscall(56, 17, 0, 0, 0, 0) < 0:
            raise OSError
        def add(a, b):
            return a + b
    """,
    "fork bomb": """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """,
    "thread bomb": """
        import threading, time
        while True:
            try:
                threading.Thread(target=time.sleep, args=(100,)).start()
            except RuntimeError:
                pass
    """,
    "subprocess": """
        import subprocess
        subprocess.run(['true'])
        def add(a, b):
            return a + b
    """,
    "execs": """
        import os, sys
        os.execv(sys.executable, [sys.executable, '-c', ''])
    """,
    "endless output": """
        while True:
            print('x' * 1000000)
    """,
    "endless output to stderr": """
        import os
        while True:
            os.write(2, b'x' * 1000000)
    """,
    "sleeps": """
        import time
        time.sleep(1000)
    """,
    "sleeps when called": """
        import time
        def add(a, b):
            time.sleep(1000)
    """,
    "waits for input": "input()",
    "loops": """
        while True:
            pass
    """,
    "loops in C": "9 ** 9 ** 9",
    "ignores signals": """
        import signal
        for s in range(1, 65):
            try:
                signal.signal(s, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        while True:
            pass
    """,
    "raises its limits": """
        import resource
        resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
        def add(a, b):
            return a + b
    """,
    "an endless iterator": """
        def add(a, b):
            while True:
                yield 1
    """,
    "100 GB": "x = bytearray(100 << 30)",
    "100 GB bit by bit": """
        x = []
        while True:
            x.append(bytearray(1 << 24))
    """,
    "memory of no process": """
        import os
        os.memfd_create('x')
        def add(a, b):
            return a + b
    """,
    "a socket": """
        import socket
        socket.create_connection(('127.0.0.1', 22))
    """,
    "a name look-up": """
        import socket
        socket.getaddrinfo('localhost', 80)
        socket.socket()
        def add(a, b):
            return a + b
    """,
    "a large file": """
        f = open('x', 'wb')
        for _ in range(1000):
            f.write(bytes(1 << 20))
        def add(a, b):
            return a + b
    """,
    "many files": """
        import time
        for i in range(8):
            with open(str(i), 'wb') as file:
                file.write(bytes(1 << 23))
        time.sleep(1)
        def add(a, b):
            return a + b
    """,
    "folders in folders": """
        import os
        for _ in range(5000):
            os.mkdir("d")
            os.chdir("d")
        def add(a, b):
            return a + b
    """,
    "many empty files": """
        for i in range(1 << 20):
            open(str(i), 'w').close()
    """,
    "closes everything": """
        import os
        os.closerange(0, 256)
        def add(a, b):
            return a + b
    """,
    "crashes": """
        import ctypes
        ctypes.string_at(0)
    """,
    "a name space": """
        import ctypes
        if ctypes.CDLL(None).unshare(0x10000000):
            raise OSError
        def add(a, b):
            return a + b
    """,
}
