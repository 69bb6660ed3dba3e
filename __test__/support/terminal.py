"""Runs a command in a terminal of its own, closes the terminal once a text has appeared, and prints how the command ended.

Usage: terminal.py TEXT HANGUPS COMMAND...   HANGUPS: how many more SIGHUPs the command is sent, as a shell sends one.
"""
import json
import os
import pty
import signal
import sys
import time

text, hangups, command = sys.argv[1].encode(), int(sys.argv[2]), sys.argv[3:]
pid, terminal = pty.fork()
if pid == 0:
    os.execvp(command[0], command)
shown = b""
while text not in shown:
    try:
        part = os.read(terminal, 65536)
    except OSError:
        part = b""
    if not part:
        break
    shown += part
os.close(terminal)
for _ in range(hangups):
    time.sleep(0.02)
    try:
        os.kill(pid, signal.SIGHUP)
    except ProcessLookupError:
        break
_, status = os.waitpid(pid, 0)
ended = {
    "appeared": text in shown,
    "signal": signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else None,
    "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
    "shown": shown.decode("utf8", "replace"),
}
print(json.dumps(ended))
