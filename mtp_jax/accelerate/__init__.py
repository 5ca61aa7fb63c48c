"""`mtp accelerate`: from a model to heads that draft for it.

    prompts   what one may ask the model: from a file, or written by the model itself      prompts.py
    answers   what the model says to them, batch by batch                                  answers.py
    heads     trained on the answers, with the model frozen                                stages.py
    report    how much faster held-out prompts decode, and a page on it                    report.py

Every stage writes its result whole or not at all, and is skipped where that is there. All numbers that were measured
stand in `plan.json` before they are used, so that a run that was killed goes on as it would have.
"""
