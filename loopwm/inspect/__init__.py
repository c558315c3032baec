"""What the loop of a trained run does: ``python -m loopwm.inspect RUN_DIR [--out DIR]``.

It reads a run's newest checkpoint and the replay beside it, and writes a picture, the figures behind it as JSON, and
a page that says what they mean. Nothing is trained and no environment is needed.
"""
