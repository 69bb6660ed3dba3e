"""Talks to a command in a terminal of its own, and prints how it ended.

Usage: talk.py STEPS COMMAND...   STEPS: a JSON list of [TEXT, KEYS]: once TEXT has appeared, KEYS are typed.
"""
import json
import os
import pty
import signal
import sys

steps, command = json.loads(sys.argv[1]), sys.argv[2:]
pid, terminal = pty.fork()
if pid == 0:
    os.execvp(command[0], command)
signal.alarm(60)
shown, seen = b"", 0


def read():
    """More of what the command shows; False where it has ended."""
    global shown
    try:
        part = os.read(terminal, 65536)
    except OSError:
        part = b""
    shown += part
    return part != b""


for text, keys in steps:
    while text.encode() not in shown[seen:]:
        if not read():
            break
    seen = shown.find(text.encode(), seen) + len(text.encode())
    os.write(terminal, keys.encode())
while read():
    pass
_, status = os.waitpid(pid, 0)
ended = {
    "signal": signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else None,
    "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
    "shown": shown.decode("utf8", "replace"),
}
print(json.dumps(ended))
