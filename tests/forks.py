"""Runs the project's scripts, each in a fork of one process that has imported torch already.

What a script does in a process of its own, it does here: its own output, exit code, signals. Only
the second that importing torch takes is spent once. The fixture `forks` in conftest.py starts it.

stdin: a line of JSON for each request, a list of {argv, env, output, seconds}, which run at once;
stdout: their exit codes, a line for each request.
"""
import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Forks:
    """The process, as the tests see it."""

    def __init__(self):
        self.server = subprocess.Popen([sys.executable, __file__], cwd=ROOT, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, *argv: object, seconds: int = 120) -> subprocess.CompletedProcess:
        """A script and its arguments, ended by a signal after so many seconds."""
        return self.run_together([argv], seconds)[0]

    def run_together(self, commands: list[tuple], seconds: int = 120,
                     env: list[dict[str, str]] | None = None) -> list[subprocess.CompletedProcess]:
        """Several at once, each with its own additions to the environment."""
        with tempfile.TemporaryDirectory() as folder:
            requests = [{"argv": list(map(str, argv)), "env": env[i] if env else {},
                         "output": f"{folder}/{i}", "seconds": seconds}
                        for i, argv in enumerate(commands)]
            print(json.dumps(requests), file=self.server.stdin, flush=True)
            codes = json.loads(self.server.stdout.readline())
            return [subprocess.CompletedProcess(
                request["argv"], code, *(Path(request["output"] + name).read_text()
                                         for name in (".out", ".err")))
                    for request, code in zip(requests, codes)]

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()


def child(argv: list[str], env: dict[str, str], output: str, seconds: int) -> None:
    """Be the script; does not return."""
    code = 1
    for number, file in ((0, os.devnull), (1, output + ".out"), (2, output + ".err")):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), number)
    try:
        signal.alarm(seconds)
        os.environ.update(env)
        sys.argv, sys.path[0] = argv, str((ROOT / argv[0]).parent)
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import evaluate                                      # noqa: F401
    import train                                         # noqa: F401
    sys.path.pop(0)
    for line in sys.stdin:
        started = []
        for request in json.loads(line):
            started.append(os.fork())
            if started[-1] == 0:
                child(**request)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]),
              flush=True)


if __name__ == "__main__":
    main()
