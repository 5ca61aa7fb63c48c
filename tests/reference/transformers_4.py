"""Run in a process of its own, with transformers 4 ahead on the path: what it makes of exported directories.

    python transformers_4.py JOB.json OUT.npz

JOB.json lists directories, each with token ids and texts. OUT.npz gets the logits of each, or why it was refused, and
ids.json next to it the ids of its texts.
"""

import json
import pathlib
import sys
import warnings


def main(job, out):
    import numpy as np
    import torch
    import transformers

    assert transformers.__version__.startswith("4."), transformers.__version__
    transformers.logging.set_verbosity_error()
    logits, ids = {}, {}
    for name, (directory, tokens, texts) in json.loads(pathlib.Path(job).read_text()).items():
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, torch_dtype="auto", attn_implementation="eager"
            )
            with torch.no_grad():
                logits[name] = model.eval().float()(torch.tensor(tokens)).logits.numpy()
            if texts:
                tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
                ids[name] = [tokenizer(text).input_ids for text in texts]
        except Exception as error:
            logits[name] = np.array(f"{type(error).__name__}: {error}")
    np.savez(out, **logits)
    pathlib.Path(out).with_name("ids.json").write_text(json.dumps(ids))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
