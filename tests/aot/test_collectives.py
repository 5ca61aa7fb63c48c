"""What a program sends, against programs with known traffic."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from mtp_jax import sharding
from mtp_jax.aot.collectives import Sent, read
from mtp_jax.config import MeshConfig

TPU = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%gathered.1 (p.1: bf16[8,64]) -> bf16[8,256] {
  %p.1 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=1, \
replica_groups=[2,4]<=[8], dimensions={1}, frontend_attributes={chain_id="16"}
}

%gathered.2 (p.2: bf16[8,64]) -> bf16[8,256] {
  %p.2 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[8,256]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=1, \
replica_groups=[2,4]<=[8], dimensions={1}, frontend_attributes={chain_id="16"}
}

%all-reduce-scatter.7 (p.3: f32[16,128]) -> f32[4,128] {
  %p.3 = f32[16,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.3 = f32[16,128]{1,0:T(8,128)} all-reduce(%p.3), channel_id=2, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %mine = f32[4,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.3, %zero, %zero), dynamic_slice_sizes={4,128}
}

%cond (c: (s32[], f32[16,128])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[16,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %end = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[]{:T(512)} compare(%i, %end), direction=LT
}

%body (s: (s32[], f32[16,128])) -> (s32[], f32[16,128]) {
  %s = (s32[]{:T(128)}, f32[16,128]{1,0}) parameter(0)
  %x = f32[16,128]{1,0} get-tuple-element(%s), index=1
  %fusion.1 = f32[4,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.7
  %all-reduce.4 = f32[16,128]{1,0} all-reduce(%x), channel_id=3, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, to_apply=%add
  ROOT %next = (s32[]{:T(128)}, f32[16,128]{1,0}) tuple(%s)
}

ENTRY %main (q: bf16[8,64]) -> f32[16,128] {
  %q = bf16[8,64]{1,0} parameter(0)
  %first = bf16[8,256]{1,0} fusion(%q), kind=kCustom, calls=%gathered.1
  %second = bf16[8,256]{1,0} fusion(%q), kind=kCustom, calls=%gathered.2
  %start = s32[]{:T(128)} constant(2)
  %turn = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%q), channel_id=4, \
source_target_pairs={{0,1},{1,0}}
  %turned = f32[16]{0} collective-permute-done(%turn)
  %init = (s32[]{:T(128)}, f32[16,128]{1,0}) tuple(%start, %q)
  %while.1 = (s32[]{:T(128)}, f32[16,128]{1,0}) while(%init), condition=%cond, body=%body
  ROOT %out = f32[16,128]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_text_of_a_tpu_program():
    """Five turns, from 2 below 7, of a reduce-scatter among 4 and an all-reduce among 2; one gather, in two pieces.

    Without the lines on `chain_id` there are two gathers; without `scattered` the scatter is an all-reduce.
    """
    sent, unknown = read(TPU, 8)
    array = 16 * 128 * 4
    assert unknown == 0
    assert sent == {
        "all-gather": Sent(1, 8 * 256 * 2 * 3 // 4),
        "all-reduce": Sent(5, 5 * array * 2 // 2),
        "reduce-scatter": Sent(5, 5 * array * 3 // 4),
        "collective-permute": Sent(1, 64),
    }


def test_loop_of_unknown_length_is_told():
    """A loop whose condition compares with no constant counts one turn and is named as unknown."""
    sent, unknown = read(TPU.replace("s32[]{:T(128)} constant(7)", "s32[]{:T(128)} get-tuple-element(%c), index=0"), 8)
    assert (unknown, sent["all-reduce"].count) == (1, 1)


@pytest.mark.parametrize("turns", [1, 6])
def test_program_with_known_traffic(turns):
    """A scan of `turns` over psum and all_gather of [32, 64] f32 on 8 devices: bytes as in the module's table.

    Counting the loop's body once fails for 6 turns.
    """
    mesh = sharding.make_mesh(MeshConfig(data=8))

    def local(x):
        def step(x, _):
            summed = jax.lax.psum(x, "data")
            gathered = jax.lax.all_gather(summed * x, "data", axis=0, tiled=True)
            return gathered[:32] + summed, None

        return jax.lax.scan(step, x, None, length=turns)[0]

    rows = PartitionSpec("data")
    program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False))
    sent, unknown = read(program.lower(jnp.zeros((256, 64))).compile().as_text(), 8)
    array = 32 * 64 * 4
    assert unknown == 0
    assert sent["all-reduce"] == Sent(turns, turns * array * 2 * 7 // 8)
    assert sent["all-gather"] == Sent(turns, turns * 8 * array * 7 // 8)
