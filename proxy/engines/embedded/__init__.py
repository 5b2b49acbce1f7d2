"""The embedded engine: llama-cpp-python in a supervised child process.

`engine.py` is the parent's side and imports nothing of llama.cpp; `child.py` is the process that
owns the model. Between them go the frames of `protocol.py`.
"""
