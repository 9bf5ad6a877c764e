"""The embedded engine: VAD, speech recognition, a small language model and speech synthesis, all on the CPU.

Importing this package loads no model; `runner.CascadeRunner` does, on the engine thread.
"""

import os

# llama.cpp's threads wait for each other some hundred times a token. GNU OpenMP lets them spin 300 times longer than
# this before they sleep, and on two cores with one other busy program a token then took 520 ms instead of 40; with
# this it takes 90, and on an idle machine no longer than before. It is read when the library is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
