"""The embedded engine: VAD, speech recognition, a small language model and speech synthesis, all on the CPU.

Importing this package loads no model; `runner.CascadeRunner` does, on the engine thread.
"""

import os

# llama.cpp's threads wait for each other some hundred times a token. How long GNU OpenMP lets them spin before they
# sleep decides what another busy program does to them: on two cores a token took 37-41 ms alone whatever the count,
# and beside one busy program 130 ms by default, 520 ms at 30,000 spins and 95 ms at 1,000; but with our own VAD and
# recogniser beside it, answers began 0.28 s sooner at 10,000 than at 1,000. Read when the library is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
