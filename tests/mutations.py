"""Breaks one line at a time, and shows which test of the default suite notices.

    python tests/mutations.py              every mutation
    python tests/mutations.py rope bonus   those with one of these words in their names
    python tests/mutations.py --list

Each mutation replaces a piece of a file in a copy of the tree and runs the default tier of the test files named with
it. A mutation that no test notices is printed as SURVIVED, and the exit status is 1. `tests/test_mutations.py` keeps
this list in step with the code: every piece must stand in its file exactly once.
"""

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One broken line."""

    name: str
    """What is lost."""
    file: str
    """Below `mtp_jax/`."""
    old: str
    new: str
    tests: str
    """Test files, below `tests/`, that should notice."""


NAMED = (
    Mutation(
        "a response that the limit cut counts by its last number",
        "eval/inference/run.py",
        'right=record["correct"] and not cut,',
        'right=record["correct"],',
        "eval/test_inference_run.py",
    ),
    Mutation(
        "the tokens of the judge are not counted",
        "eval/inference/ledger.py",
        "return self.prompt + self.answer + self.judge + self.revision",
        "return self.prompt + self.answer + self.revision",
        "eval/test_inference_run.py",
    ),
    Mutation(
        "pass@k draws with replacement",
        "eval/inference/estimates.py",
        "return 1 - math.comb(n - correct, k) / math.comb(n, k)",
        "return 1 - (1 - correct / n) ** k",
        "eval/test_inference_estimates.py",
    ),
    Mutation(
        "bytes: the ids of the Byte Latent Transformer are the bytes plus 3",
        "data/tokenize.py",
        "symbols = {_byte_symbol(byte): byte + len(special) for byte in range(256)}",
        "symbols = {_byte_symbol(byte): byte + len(special) - 1 for byte in range(256)}",
        "data/test_byte_tokens.py",
    ),
    Mutation(
        "noise: every document draws the same",
        "data/noise.py",
        'key = f"{seed}\\0{place}\\0{noise.kind}\\0{name}".encode(errors="surrogateescape")',
        'key = f"{seed}\\0{place}\\0{noise.kind}".encode(errors="surrogateescape")',
        "data/test_noise.py",
    ),
    Mutation(
        "noise: a repeat stands 2 or 3 times",
        "data/noise.py",
        "extra_T = 1 + np.floor(rng.random(len(codes_T)) * (LONGEST_REPEAT - 1)).astype(int)",
        "extra_T = 1 + np.floor(rng.random(len(codes_T)) * (LONGEST_REPEAT - 2)).astype(int)",
        "data/test_noise.py",
    ),
    Mutation(
        "noise: learned parts stay at their old places",
        "data/noise.py",
        "learned = None if document.learned is None else tuple((ends[start], ends[stop]) for start, stop in spans)",
        "learned = document.learned",
        "data/test_noise.py",
    ),
    Mutation(
        "noise: held-out documents are noisy, too",
        "data/loader.py",
        "documents = noised(documents, noises, data.seed, set(split[0].tolist()))",
        "documents = noised(documents, noises, data.seed)",
        "data/test_noise.py",
    ),
    Mutation(
        "noise: bits per byte of noisy text are divided by the clean bytes",
        "eval/noisy.py",
        'return HeldText(f"{text.kind}, {noise}", rows, documents)',
        'return HeldText(f"{text.kind}, {noise}", rows, text.documents)',
        "eval/test_noisy.py",
    ),
    Mutation(
        "patches: documents of a packed row see one another",
        "model/entropies.py",
        "hidden_1BTD = mtp.apply(arch, trunk, tokens_BT, _positions(segment_ids_BT), segment_ids_BT)",
        "hidden_1BTD = mtp.apply(arch, trunk, tokens_BT, _positions(segment_ids_BT), jnp.ones_like(segment_ids_BT))",
        "eval/test_patches.py",
    ),
    Mutation(
        "patches: the last patch of a row is lost",
        "eval/patches.py",
        "return np.diff(np.flatnonzero(starts_T), append=used)",
        "return np.diff(np.flatnonzero(starts_T))",
        "eval/test_patches.py",
    ),
    Mutation(
        "blt: a byte reads the latent of its own unfinished patch",
        "model/blt/slots.py",
        "last_BT = jnp.minimum(jnp.where(ends_BT, ids_BT, ids_BT - 1), slots - 1)",
        "last_BT = jnp.minimum(ids_BT, slots - 1)",
        "model/test_blt.py",
    ),
    Mutation(
        "blt: a patch attends to bytes after it",
        "model/blt/model.py",
        "mixed_BXkNH = over_own_bytes(queries.q_BXkNH, k_BTKH, v_BTKH, patches.ids_BT)",
        "mixed_BXkNH = over_own_bytes(queries.q_BXkNH, k_BTKH, v_BTKH, jnp.zeros_like(patches.ids_BT))",
        "model/test_blt.py",
    ),
    Mutation(
        "blt: the end of the prefix ends a patch in decoding",
        "model/blt/decoding.py",
        "    ends_BS = ended(model, of_bytes)\n",
        "    ends_BS = ended(model, of_bytes)\n"
        "    ends_BS |= jnp.arange(of_bytes.slots)[None] == start_B[:, None] + count - 1\n",
        "decode/test_byte_patches.py",
    ),
    Mutation(
        "blt: a row that is cut ends its last patch",
        "model/blt/slots.py",
        "    last_BT = jnp.minimum(",
        "    ends_BT = ends_BT.at[:, -1].set(True)\n    last_BT = jnp.minimum(",
        "model/test_patching.py",
    ),
    Mutation(
        "patches: the end of a row is a border",
        "model/blt/patching.py",
        "    ends_BT |= first_BT\n",
        "    ends_BT |= first_BT | (jnp.arange(shape[1])[None] == shape[1] - 1)\n",
        "model/test_patching.py",
    ),
    Mutation(
        "blt: later guesses read the patch that they seem to end",
        "model/blt/local.py",
        "    last_B = jnp.maximum(jnp.sum(ends_BS, axis=1) - 1, 0)\n",
        "    last_B = jnp.maximum(jnp.sum(ended(model, caches.of_bytes), axis=1) - 1, 0)\n",
        "decode/test_local_drafts.py",
    ),
    Mutation(
        "blt: a guess does not see the guesses before it",
        "model/blt/local.py",
        "NewTokens(embed(model, view, drafts.tokens_BP), drafts.tokens_BP, new.start_B + 1)",
        "NewTokens(embed(model, view, drafts.tokens_BP), drafts.tokens_BP, new.start_B)",
        "decode/test_local_drafts.py",
    ),
    Mutation(
        "patches: another rule cuts than the one that is printed",
        "cli/patches.py",
        "figures = PatchFigures.of(whole.starts(rule), whole.segment_ids_BT)",
        "figures = PatchFigures.of(whole.starts(PatchRule()), whole.segment_ids_BT)",
        "eval/test_patches.py",
    ),
    Mutation(
        "the teacher of a standalone model reads the text, not the student's tokens",
        "training/objectives/regions.py",
        "teacher = _taught(config, spec, frozen, rows, written_PBX)",
        "teacher = _taught(config, spec, frozen, rows, ids_MBX[:-1])",
        "training/test_regions.py",
    ),
    Mutation(
        "the regions of a standalone model do not depend on the step",
        "training/objectives/targets.py",
        "key = jax.random.fold_in(jax.random.key(config.train.seed), step)",
        "key = jax.random.key(config.train.seed)",
        "training/test_regions.py",
    ),
    Mutation(
        "ConfAdapt ignores whether the model is sure of the pending token",
        "decode/verify.py",
        "first_B = jnp.sum(jnp.cumprod(sure_BQ > rule.tau, axis=1), axis=1)",
        "first_B = 1 + jnp.sum(jnp.cumprod(sure_BQ[:, 1:] > rule.tau, axis=1), axis=1)",
        "decode/test_standalone.py",
    ),
    Mutation(
        "every token of a round has masks, also under a rule that knows the last one",
        "decode/engine.py",
        "ask = Ask(min(plan.drafter.masks, width), taken_B, plan.drafter.taps, embedded)",
        "ask = Ask(min(plan.drafter.masks, width), None, plan.drafter.taps, embedded)",
        "decode/test_standalone.py",
    ),
    Mutation(
        "queries of GGUF files stay in llama.cpp's order",
        "convert/gguf/tensors.py",
        "values = dequantize(raw if self.rows is None else raw[self.rows], kind)",
        "values = dequantize(raw, kind)",
        "convert/test_gguf.py",
    ),
    Mutation(
        "drafts count after a rejected one, teacher-forced",
        "eval/figures.py",
        "used_T = used_T & (scored.top_MT[head]",
        "used_T = (scored.top_MT[head]",
        "eval/test_figures.py",
    ),
    Mutation(
        "a control fails if its mean is worse",
        "eval/intervals.py",
        "return bool(self.low > 0)",
        "return bool(self.value > 0)",
        "eval/test_figures.py",
    ),
    Mutation(
        "two models are compared on other documents",
        "eval/intervals.py",
        "first, second = _drawn((one, other), seed)\n    return _interval(one.value",
        "first, second = _drawn((one,), 0)[0], _drawn((other,), 1)[0]\n    return _interval(one.value",
        "eval/test_intervals.py",
    ),
    Mutation(
        "spans are scored one token late",
        "eval/span_metrics.py",
        "before = kept.start - 1\n    document = scored",
        "before = kept.start\n    document = scored",
        "eval/test_spans.py",
    ),
    Mutation(
        "the kernel does not filter the calls of an answer",
        "eval/sandbox/inside/answer.py",
        "calls_kept = kernel.refuse_calls()",
        "calls_kept = True",
        "eval/test_sandbox.py",
    ),
    Mutation(
        "an answer may write anywhere",
        "eval/sandbox/inside/answer.py",
        "files_kept = kernel.restrict_files(sorted(readable), directory)",
        "files_kept = True",
        "eval/test_sandbox.py",
    ),
    Mutation(
        "a fetched wheel is used unchecked",
        "convert/fetch.py",
        "if found != known.sha256:",
        "if not found:",
        "convert/test_fetch.py",
    ),
    Mutation(
        "targets cross documents",
        "losses/targets.py",
        "weight_BT = jnp.where(same_document_BT, ahead(counted_BT, m + 1), 0)",
        "weight_BT = ahead(counted_BT, m + 1)",
        "losses/test_targets.py",
    ),
    Mutation(
        "one head learns the prompt",
        "losses/targets.py",
        "weight_BT = jnp.where(same_document_BT, ahead(counted_BT, m + 1), 0)",
        "one_BT = 1.0 * (segment_ids_BT != 0)\n"
        "        weight_BT = jnp.where(same_document_BT, ahead(counted_BT if m != 2 else one_BT, m + 1), 0)",
        "losses/test_targets.py training/test_objective.py",
    ),
    Mutation(
        "weights of tokens become marks",
        "losses/targets.py",
        "else weights_BT.astype(jnp.float32)",
        "else (weights_BT != 0).astype(jnp.float32)",
        "losses/test_targets.py",
    ),
    Mutation(
        "extra arrays lie one off",
        "data/pack.py",
        "batch[name][:size] = array[start:stop]",
        "batch[name][1:size] = array[start : stop - 1]",
        "data/test_extras.py",
    ),
    Mutation(
        "marks of tokens lie one off",
        "data/pack.py",
        "learn[:size] &= self.learn[start:stop] != 0",
        "learn[1:size] &= self.learn[start : stop - 1] != 0",
        "data/test_learned.py",
    ),
    Mutation(
        "the assistant's role is learned",
        "data/chat.py",
        "before = self._render(messages[:i], add_generation_prompt=True)",
        "before = self._render(messages[:i])",
        "data/test_chat.py",
    ),
    Mutation(
        "a turn counts tokens that are not held",
        "decode/held.py",
        "while same < min(len(self.ids), len(ids) - 1) and self.ids[same] == ids[same]:",
        "while same < min(len(self.ids), len(ids) - 1):",
        "decode/test_conversation.py",
    ),
    Mutation(
        "a turn writes the states of an earlier one",
        "model/heads/sequential.py",
        "back_B = jnp.minimum(now.start_B - now.begin_B, tail)",
        "back_B = jnp.minimum(now.start_B, tail)",
        "decode/test_conversation.py",
    ),
    Mutation(
        "cache slots behind the cursor are seen",
        "kernels/attention.py",
        "<= query_slots_BT[:, :, None]\n",
        "<= jnp.max(query_slots_BT, axis=1)[:, None, None]\n",
        "kernels/test_attention.py",
    ),
    Mutation(
        "no bonus token",
        "decode/verify.py",
        "count_B = jnp.minimum(jnp.minimum(matched_B, first_end_B) + 1, room_B)",
        "count_B = jnp.minimum(jnp.minimum(jnp.maximum(matched_B, 1), first_end_B + 1), room_B)",
        "decode/test_verify.py",
    ),
    Mutation(
        "rows share a cursor",
        "model/cache.py",
        "return jax.lax.dynamic_update_slice(old_BKSH, new_1KQH, (b, 0, start_B[b], 0))",
        "return jax.lax.dynamic_update_slice(old_BKSH, new_1KQH, (b, 0, start_B[0], 0))",
        "model/test_cache.py model/test_decode_forward.py",
    ),
    Mutation(
        "dW is summed in the states' dtype",
        "losses/fused.py",
        'new_DV = jnp.einsum("DC,CV->DV", h_DC, chunk.dz_CV, preferred_element_type=jnp.float32)',
        'new_DV = jnp.einsum("DC,CV->DV", h_DC, chunk.dz_CV)',
        "losses/test_xent_precision.py",
    ),
    Mutation(
        "the sum of dW is kept in the states' dtype",
        "losses/fused.py",
        "jnp.zeros((table_VD.shape[1], V), jnp.float32) if learn else None",
        "jnp.zeros((table_VD.shape[1], V), hidden_MBTD.dtype) if learn else None",
        "losses/test_xent_precision.py",
    ),
    Mutation(
        "head_scale of each micro-batch alone",
        "training/step.py",
        "total_loss(config, spec, params, *micro, given.scale_M, objective)",
        "total_loss(config, spec, params, *micro, "
        "scales(config, jnp.sum(micro[1].weights_MBT, axis=(1, 2)), jnp.asarray(config.head_weights))"
        " / config.train.grad_accum, objective)",
        "training/test_step.py",
    ),
    Mutation(
        "two dimensions on one mesh axis",
        "sharding.py",
        "if len(used) != len(set(used)):",
        "if False:",
        "test_sharding.py",
    ),
    Mutation(
        "the loss of a split vocabulary is not summed",
        "losses/fused.py",
        "labels_CW = across(jax.lax.psum, pick(soft.z_CV, ids_CW - first_id), axes)",
        "labels_CW = pick(soft.z_CV, ids_CW - first_id)",
        "losses/test_xent_sharded.py",
    ),
    Mutation(
        "noise without the position",
        "decode/sampling.py",
        "(None, 0)))(controls.key_B, position_BQ)\n    return draw(",
        "(None, 0)))(controls.key_B, 0 * position_BQ)\n    return draw(",
        "decode/test_sampled.py decode/test_sampling.py",
    ),
    Mutation(
        "rejection draws from p instead of the residual",
        "decode/verify.py",
        "residual_BQV = jnp.maximum(target_probs_BQV - jnp.pad(draft_probs_BPV, ((0, 0), (0, 1), (0, 0))), 0.0)",
        "residual_BQV = target_probs_BQV",
        "decode/test_verify.py",
    ),
    Mutation(
        "tokens behind an end token are emitted",
        "decode/verify.py",
        "count_B = jnp.minimum(jnp.minimum(matched_B, first_end_B) + 1, room_B)",
        "count_B = jnp.minimum(matched_B + 1, room_B)",
        "decode/test_verify.py",
    ),
    Mutation(
        "the limit does not cut a round",
        "decode/verify.py",
        "count_B = jnp.minimum(jnp.minimum(matched_B, first_end_B) + 1, room_B)",
        "count_B = jnp.minimum(matched_B, first_end_B) + 1",
        "decode/test_verify.py",
    ),
    Mutation(
        "sequential entries that rest on drafts stay",
        "model/heads/sequential.py",
        "back_B = jnp.minimum(now.start_B - now.begin_B, tail)",
        "back_B = jnp.zeros_like(now.start_B)",
        "model/test_decode_forward.py",
    ),
    Mutation(
        "no checksum of a checkpoint",
        "runs/integrity.py",
        "if crc32(path) != crc:",
        "if False:",
        "runs/test_checkpoint.py",
    ),
    Mutation(
        "files are written in place",
        "runs/integrity.py",
        "    os.replace(temporary, path)\n",
        "    path.write_text(text)\n",
        "runs/test_checkpoint.py",
    ),
    Mutation(
        "directories are published before they are whole",
        "runs/integrity.py",
        "        os.replace(temporary, out)\n",
        "        shutil.copytree(temporary, out, dirs_exist_ok=True)\n",
        "runs/test_integrity.py",
    ),
    Mutation(
        "no manifest before a checkpoint is published",
        "runs/checkpoint.py",
        "            write_manifest(directory)\n",
        "            pass\n",
        "runs/test_checkpoint.py",
    ),
    Mutation(
        "the data position is not restored",
        "runs/checkpoint.py",
        "        iterator.set_state(restored.data)\n",
        "",
        "runs/test_checkpoint.py",
    ),
    Mutation(
        "one sign in rope",
        "model/rope.py",
        "low_BTNh * cos_BT1h - high_BTNh * sin_BT1h",
        "low_BTNh * cos_BT1h + high_BTNh * sin_BT1h",
        "model/test_rope.py",
    ),
    Mutation(
        "Meta's q and k are not permuted",
        "convert/layout.py",
        "return pairs_NhP.swapaxes(1, 2).reshape(-1)",
        "return pairs_NhP.reshape(-1)",
        "convert/test_forms.py",
    ),
    Mutation(
        "GPT-NeoX's q, k and v are not untangled",
        "convert/layout.py",
        "return np.arange(count).reshape(model.num_heads, 3, model.head_dim)[:, part].reshape(-1)",
        "return np.arange(count).reshape(3, model.num_heads, model.head_dim)[part].reshape(-1)",
        "convert/test_architectures.py",
    ),
    Mutation(
        "an unknown config field is dropped",
        "config/text.py",
        "    types = typing.get_type_hints(cls)\n",
        "    types = typing.get_type_hints(cls)\n    tree = {key: tree[key] for key in tree if key in types}\n",
        "config/test_config.py",
    ),
    Mutation(
        "torch files run their code",
        "convert/pickled.py",
        '        raise UserError(\n            f"{self._path} would',
        '        return super().find_class(module, name)\n        raise UserError(\n            f"{self._path} would',
        "convert/test_files.py",
    ),
)
"""The lines that the design names."""

OTHERS = (
    Mutation(
        "positions do not restart with a document",
        "data/pack.py",
        'batch["positions"][:size] = np.arange(size) - np.repeat(begins, lengths)',
        'batch["positions"][:size] = np.arange(size)',
        "data/test_pack.py",
    ),
    Mutation(
        "rows do not share a token",
        "data/pack.py",
        "start = row * (self.seq_len - 1)",
        "start = row * self.seq_len",
        "data/test_pack.py",
    ),
    Mutation(
        "a giant document is held out",
        "data/sources.py",
        "if sizes[index] <= target:",
        "if True:",
        "data/test_sources.py",
    ),
    Mutation(
        "every process reads all rows",
        "data/loader.py",
        "for position in mine]",
        "for position in range(len(mine))]",
        "data/test_loader.py",
    ),
    Mutation(
        "half the gradient of the z-loss",
        "losses/objectives.py",
        "scale_C = (hard + 2 * objective.z_loss * soft.lse_C) / soft.sum_C",
        "scale_C = (hard + objective.z_loss * soft.lse_C) / soft.sum_C",
        "losses/test_xent.py",
    ),
    Mutation(
        "no gradient through the soft cap",
        "losses/fused.py",
        "dz_CV *= 1 - (soft.z_CV * spec.temperature / spec.softcap) ** 2",
        "pass",
        "losses/test_xent.py",
    ),
    Mutation(
        "label smoothing without its gradient",
        "losses/objectives.py",
        "        dz_CV -= hard * s / vocab\n",
        "        pass\n",
        "losses/test_objectives.py",
    ),
    Mutation(
        "the cotangent of the loss is ignored",
        "losses/fused.py",
        "dtable_VD = (dtable_VD * scale).astype(table_dtype.dtype)",
        "dtable_VD = dtable_VD.astype(table_dtype.dtype)",
        "losses/test_xent.py",
    ),
    Mutation(
        "entropy weights round down",
        "losses/entropy.py",
        "jnp.ceil(fraction * count * (1 - SLACK))",
        "jnp.floor(fraction * count)",
        "losses/test_entropy.py",
    ),
    Mutation(
        "a quantile without interpolation",
        "losses/entropy.py",
        "jnp.where(share > 0, below + share * (above - below), below)",
        "below",
        "losses/test_entropy.py",
    ),
    Mutation(
        "each device selects alone",
        "losses/entropy.py",
        "jax.lax.all_gather(here_U, axis_name).ravel()",
        "here_U",
        "losses/test_entropy.py",
    ),
    Mutation(
        "no gradient through the temperature",
        "losses/fused.py",
        "dz_CV /= spec.temperature",
        "pass",
        "losses/test_logprobs.py",
    ),
    Mutation(
        "one clip for both sides",
        "losses/policy.py",
        "1 + options.clip_high)",
        "1 + options.clip_low)",
        "losses/test_policy_loss.py",
    ),
    Mutation(
        "equal rewards have advantages",
        "losses/policy.py",
        "equal = np.all(groups == groups[:, :1], axis=1, keepdims=True)",
        "equal = groups.std(axis=1, keepdims=True) == 0",
        "losses/test_policy_loss.py",
    ),
    Mutation(
        "KL at the selected tokens alone",
        "losses/policy.py",
        "jnp.sum(shares_BT * k3(",
        "jnp.sum(learned_BT * k3(",
        "losses/test_policy_loss.py",
    ),
    Mutation(
        "log-probabilities of the token before",
        "rl/update.py",
        'Drawn(ahead(batch["logprobs"], 1)',
        'Drawn(batch["logprobs"]',
        "rl/test_policy_update.py",
    ),
    Mutation(
        "shares of each micro-batch alone",
        "rl/update.py",
        "shares_BT = batch[SHARES]",
        "shares_BT = token_shares(options, _weights(batch)) / seen.config.train.grad_accum",
        "rl/test_policy_update.py",
    ),
    Mutation(
        "a token counts twice in its order",
        "losses/order.py",
        "counts.append(inside_BT & ~seen_BT)",
        "counts.append(inside_BT)",
        "losses/test_order.py",
    ),
    Mutation(
        "norms decay",
        "training/optim.py",
        "decay = jax.tree.map(lambda no_decay: not no_decay, skip)",
        "decay = jax.tree.map(lambda no_decay: True, skip)",
        "training/test_optimizers.py",
    ),
    Mutation(
        "the first step has no learning rate",
        "training/optim.py",
        "return lambda step: joined(step + 1)",
        "return lambda step: joined(step)",
        "training/test_step.py training/test_optimizers.py",
    ),
    Mutation(
        "everything learns from the first step on",
        "training/heads_first.py",
        "rest_updates, rest_state = jax.lax.cond(state.step < first, wait, learn)",
        "rest_updates, rest_state = learn()",
        "training/test_heads_first.py",
    ),
    Mutation(
        "a zero outside of heads loses its sign",
        "training/heads_first.py",
        "return of_heads(new) | rest",
        "return new",
        "training/test_heads_first.py",
    ),
    Mutation(
        "the trunk's gradient clips that of heads which learn alone",
        "training/step.py",
        "jax.lax.cond(state.step < config.train.heads_first, of_heads, of_all)",
        "of_all()",
        "training/test_heads_first.py",
    ),
    Mutation(
        "the newest checkpoint is opened instead of the best",
        "runs/checkpoint.py",
        "tried = [one for one in steps if one != best] + last if step is None else [step]",
        "tried = steps if step is None else [step]",
        "training/test_patience.py",
    ),
    Mutation(
        "the best checkpoint is deleted",
        "runs/checkpoint.py",
        "return [keep or one.step == self._best() for keep, one in zip(newest, checkpoints, strict=True)]",
        "return newest",
        "training/test_patience.py",
    ),
    Mutation(
        "an equal held-out loss is better",
        "training/patience.py",
        "if value < self._best:",
        "if value <= self._best:",
        "training/test_patience.py",
    ),
    Mutation(
        "a run that continues forgets its evaluations",
        "training/patience.py",
        "return Patience(config, json.loads(bytes(list_from_first(list(text.encode())))))",
        "return Patience(config)",
        "training/test_patience.py",
    ),
    Mutation(
        "heads of a source always become new ones",
        "training/start.py",
        'name not in mtp.OF_HEADS or settings.init_heads == "same"',
        "name not in mtp.OF_HEADS",
        "training/test_fine_tuning.py",
    ),
    Mutation(
        "losses of heads are not followed",
        "training/step.py",
        "params[HEAD_LOSS] = running_loss(params[HEAD_LOSS], parts.sums.ce_M, parts.sums.weight_M)",
        "params[HEAD_LOSS] = parts.sums.ce_M / parts.sums.weight_M",
        "training/test_balance.py",
    ),
    Mutation(
        "a head that stands still is balanced",
        "training/step.py",
        "counts_M = jnp.arange(len(w_M)) >= (config.train.heads_only or apart)",
        "counts_M = jnp.ones(len(w_M), bool)",
        "training/test_balance.py",
    ),
    Mutation(
        "lookup does not repeat what it runs out of",
        "decode/drafters.py",
        "source_P = at + 1 + jnp.arange(count) % period",
        "source_P = at + 1 + jnp.arange(count)",
        "decode/test_lookup.py",
    ),
    Mutation(
        "top-p drops the token that reaches p",
        "decode/sampling.py",
        "kept = (before < controls.top_p) & (probs > 0) | (rank == 0)",
        "kept = (before + probs < controls.top_p) & (probs > 0) | (rank == 0)",
        "decode/test_sampling.py",
    ),
    Mutation(
        "the tail of the vocabulary never wins",
        "decode/sampling.py",
        "return jnp.where(tail_wins, drawn, token).astype(jnp.int32)",
        "return token.astype(jnp.int32)",
        "decode/test_sampling.py",
    ),
    Mutation(
        "rounds run over the end of the cache",
        "decode/engine.py",
        "return (rounds < max_rounds) & ~jnp.all(state.done_B) & fits",
        "return (rounds < max_rounds) & ~jnp.all(state.done_B)",
        "decode/test_long.py",
    ),
    Mutation(
        "the width ignores what rounds cost",
        "decode/adaptive.py",
        "self.costs[width] * np.max(remaining_B / self.tokens_per_round(width))",
        "np.max(remaining_B / self.tokens_per_round(width))",
        "decode/test_adaptive.py",
    ),
    Mutation(
        "records are of the logits after the hooks",
        "decode/engine.py",
        "_noted(plan, controls, own_BQV, choices)",
        "_noted(plan, controls, logits_BQV, choices)",
        "decode/test_records.py",
    ),
    Mutation(
        "the prefill of samples emits a token of its own",
        "decode/samples.py",
        "Sampler(logits_fn=_token_of_prompt)",
        "Sampler()",
        "decode/test_samples.py",
    ),
    Mutation(
        "pairs that are too long lose their last tokens",
        "decode/scoring.py",
        "inputs[-longest:]",
        "inputs[:longest]",
        "decode/test_score.py",
    ),
    Mutation(
        "half a stop string is shown",
        "decode/stopping.py",
        "longest = min(self.longest - 1, len(text))",
        "longest = 0",
        "decode/test_stream.py",
    ),
    Mutation(
        "blockwise attention forgets a term of its gradient",
        "kernels/blocks.py",
        '_product("BKUH,BKsH->BKUs", dmixed_BKUH, v_BKsH) - own_BKU1)',
        '_product("BKUH,BKsH->BKUs", dmixed_BKUH, v_BKsH))',
        "kernels/test_rows.py",
    ),
    Mutation(
        "yarn does not scale its queries",
        "model/rope.py",
        'if config.rope_scaling != "yarn" or not stretched:',
        "if True:",
        "model/test_rope.py convert/test_architectures.py",
    ),
    Mutation(
        "sequential heads read their own token",
        "model/heads/sequential.py",
        "embedded_BTD = _shift(embedded_BTD, rows.segment_ids_BT)",
        "embedded_BTD = embedded_BTD",
        "model/test_mtp.py model/test_decode_forward.py",
    ),
    Mutation(
        "attention is counted for half a row",
        "cost/flops.py",
        "return 2 * 2 * queries * sees * c.num_heads * c.head_dim",
        "return 2 * queries * sees * c.num_heads * c.head_dim",
        "cost/test_flops.py",
    ),
    Mutation(
        "two runs train in one directory",
        "runs/workdir.py",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "runs/test_checkpoint.py training",
    ),
    Mutation(
        "matrices are written as they lie",
        "convert/mapping.py",
        "return parameter.reshape(self.flat[::-1]).T if is_matrix(self.path) else parameter.reshape(self.flat)",
        "return parameter.reshape(self.flat)",
        "convert/test_architectures.py",
    ),
    Mutation(
        "a loss that is not finite goes on",
        "training/loop.py",
        "if not bad and math.isfinite(metrics.grad_norm):",
        "if True:",
        "training/test_loop.py",
    ),
    Mutation(
        "experts' weights are not renormalised",
        "model/layers.py",
        "if config.renormalise_experts:",
        "if False:",
        "model/test_experts.py",
    ),
    Mutation(
        "padding of the last held-out batch counts",
        "losses/targets.py",
        "counted_BT = jnp.where(segment_ids_BT != 0, given_BT, 0)",
        "counted_BT = given_BT",
        "losses/test_targets.py",
    ),
    Mutation(
        "records after the checkpoint stay",
        "runs/metrics.py",
        'if record["step"] <= last]',
        "]",
        "runs/test_metrics.py",
    ),
    Mutation(
        "a hidden file is read",
        "data/sources.py",
        'for name in names if not name.startswith(".")]',
        "for name in names]",
        "data/test_sources.py",
    ),
    Mutation(
        "a row that thinks accepts drafts",
        "decode/engine.py",
        "jnp.where(alone_B[:, None], NO_TOKEN, drafts_BP)",
        "drafts_BP",
        "decode/test_soft_thinking.py",
    ),
    Mutation(
        "weights of a mixture stay where a row takes no part",
        "decode/soft_thinking.py",
        "(after.thinks_B & context.live_B)[:, None]",
        "after.thinks_B[:, None]",
        "decode/test_soft_thinking.py",
    ),
    Mutation(
        "the entropy of Cold Stop comes after the filters",
        "decode/soft_thinking.py",
        "top_BW, ids_BW = jax.lax.top_k(log_p_BV, self.top_k)",
        "top_BW, ids_BW = jax.lax.top_k(log_p_BV, self.top_k)\n"
        "        entropy_B = -jnp.sum(jnp.exp(top_BW) * top_BW, axis=-1)",
        "decode/test_soft_thinking.py",
    ),
    Mutation(
        "a second model has the positions of the first",
        "decode/second_model.py",
        'start_B = context.start_B + params["offset_B"]',
        "start_B = context.start_B",
        "decode/test_proxy.py",
    ),
    Mutation(
        "the caches of longer prompts do not grow",
        "decode/second_model.py",
        "return Ahead(grow_caches(self.caches, slots + self.more), self.more)",
        "return Ahead(grow_caches(self.caches, slots), self.more)",
        "decode/test_proxy.py",
    ),
)
"""Lines that no such list had named before."""


def _left_out(folder: str, names: list[str]) -> set[str]:
    """What a copy of the tree does without; `runs` of the root holds models."""
    caches = {".git", "__pycache__", ".pytest_cache"} & set(names)
    return caches | ({"runs"} & set(names) if pathlib.Path(folder) == ROOT else set())


def broken(mutation: Mutation, text: str) -> str:
    """The file's text with the line broken; the old piece must stand there exactly once."""
    if text.count(mutation.old) != 1:
        raise SystemExit(
            f"{mutation.name}: {mutation.file} holds {text.count(mutation.old)} times {mutation.old!r}; bring the "
            "list in tests/mutations.py up to date"
        )
    return text.replace(mutation.old, mutation.new)


def run(mutation: Mutation, tree: pathlib.Path) -> tuple[str, float]:
    """The first test that fails with this line broken, "" for none, and the seconds that took."""
    path = tree / "mtp_jax" / mutation.file
    original = path.read_text(encoding="utf-8")
    path.write_text(broken(mutation, original), encoding="utf-8")
    began = time.monotonic()
    try:
        paths = [str(tree / "tests" / one) for one in mutation.tests.split()]
        command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "--no-header", *paths]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=900)
    finally:
        path.write_text(original, encoding="utf-8")
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+(?: \S+)*?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1, 2):
        raise SystemExit(f"{mutation.name}: pytest ended with {done.returncode}: {done.stdout[-400:]}")
    return failed[1] if failed else "", time.monotonic() - began


def main(words: list[str]) -> int:
    """Runs the mutations and prints a table; 1 if one survived."""
    chosen = [one for one in (*NAMED, *OTHERS) if not words or any(word in one.name for word in words)]
    if words == ["--list"]:
        print("\n".join(f"{one.name}: mtp_jax/{one.file}" for one in (*NAMED, *OTHERS)))
        return 0
    survived = 0
    with tempfile.TemporaryDirectory() as directory:
        tree = pathlib.Path(directory) / "tree"
        shutil.copytree(ROOT, tree, ignore=_left_out)
        for one in chosen:
            test, seconds = run(one, tree)
            survived += not test
            print(f"{one.name:<55} {test or 'SURVIVED'}  ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} were noticed")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
