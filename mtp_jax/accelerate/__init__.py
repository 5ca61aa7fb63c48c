"""`mtp accelerate`: trains heads that draft for a model. It has four stages:

    prompts   texts that the model will answer: from a file, or written by the model itself     prompts.py
    answers   the model answers the prompts, batch by batch                                     answers.py
    heads     heads are trained on the answers; the model is frozen                             stages.py
    report    held-out prompts are decoded; a page shows how much faster that became            report.py

Every stage writes its result completely or not at all. If the result exists already, the stage is skipped. Measured
numbers are written to `plan.json` before they are used, so that a run that was killed continues with the same numbers.
"""
