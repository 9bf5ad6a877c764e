"""The embedded engine: VAD, speech recognition, a small language model and speech synthesis, all on the CPU.

Importing this package loads no model; `runner.CascadeRunner` does, on the engine thread.
"""
