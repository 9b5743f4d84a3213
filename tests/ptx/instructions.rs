//! Small kernels that use each method of the writer once.

use std::collections::HashSet;

use kaio_candle::ptx::{
    Delivery, Factor, Half, Kernel, Logic3, Mma, Operand, Reg, Source, Target, Wgmma, WgmmaRegs,
};

/// With their names.
pub fn kernels() -> [(&'static str, Source); 6] {
    [
        ("writer_integers", integers()),
        ("writer_floats", floats()),
        ("writer_control", control()),
        ("writer_memory", memory()),
        ("writer_ampere", ampere()),
        ("writer_hopper", hopper()),
    ]
}

/// Keeps what was computed alive.
fn keep<'k>(k: &'k Kernel, out: Reg<'k, u64>, values: &[Reg<'k, u32>]) {
    for (i, &value) in values.iter().enumerate() {
        k.st_global(out.at(4 * i as i64), [value]);
    }
}

fn integers() -> Source {
    let k = &Kernel::new("integers", Target::Sm80, 128);
    let out = k.pointer("out");
    let (a, b, signed, long) = (
        k.param::<u32>("a"),
        k.param::<u32>("b"),
        k.param::<i32>("signed"),
        k.param::<u64>("long"),
    );
    k.note("arithmetic");
    keep(k, out, &[a + b, a - b, a * b, a / b, a % b, a & b, a | b, a ^ b, a << b, a >> b]);
    keep(k, out, &[a + 1, a / 1, a / 64, a % 64, a / 10, a % 10, a.div_ceil(64), a << 3, a >> 3]);
    let longs = [long + 8u64, long * long, long / 16u64, long % 16u64, a.wide(), a.mul_wide(b)];
    keep(k, out, &longs.map(Reg::low));
    let signs =
        [signed + -1, signed / 4, signed % 4, signed >> 2, signed.max(0), signed.or_zero().cast()];
    keep(k, out, &signs.map(Reg::cast));
    keep(k, out, &[k.lop3(Logic3::AND_OR, a, 15, b), k.lop3(Logic3::SELECT, a, b, 0xf0f0)]);
    keep(k, out, &[k.prmt(a, b, 0x5140), k.prmt(a, 0, b)]);
    let bytes = k.cvt_pack_s8(signed, signed, 0);
    keep(k, out, &[bytes, k.cvt_pack_s8(signed, signed, bytes)]);
    keep(k, out, &[a.min(b), a.max(7), a.bfe(4, 14), a.with_high(b).low(), a.with_high(7).low()]);
    k.note("comparisons");
    let tests = [a.eq(b), a.ne(b), a.lt(b), a.le(b), a.gt(b), a.ge(9)];
    let [eq, ne, lt, le, gt, ge] = tests;
    let any = (eq & ne) | (lt ^ le) | (gt & !ge);
    let sum = k.var(5u32);
    sum.increase(a);
    sum.set(k.select(any, sum, 3));
    keep(k, out, &[sum, k.select(any, sum, b)]);
    k.finish()
}

fn floats() -> Source {
    let k = &Kernel::new("floats", Target::Sm80, 128);
    let (out, x, y, n) = (k.pointer("out"), k.param::<f32>("x"), k.param::<f32>("y"), k.param("n"));
    let values = [
        x + y,
        x - 1.0,
        x * y,
        x / y,
        -x,
        x.fma(y, 0.5),
        x.fma(2.0, y),
        x.mul_rn(y),
        x.sqrt(),
        x.min(y),
        x.max(f32::NEG_INFINITY),
        x.abs(),
        x.exp2(),
        x.exp2_ftz(),
        x.tanh(),
        x.log2(),
        x.recip(),
        x.rsqrt(),
        x.copysign(y),
        Reg::<u32>::to_f32(n),
        Reg::<i32>::to_float(n.cast()),
        x.nearest().cast(),
        k.select(x.lt(y), x, f32::NAN),
    ];
    let product = k.var(x);
    product.scale(y);
    keep(k, out, &[product.cast()]);
    keep(k, out, &values.map(Reg::cast));
    for half in [Half::F16, Half::Bf16] {
        let narrow = k.cvt_rn(half, x);
        let packed = k.reg();
        keep(k, out, &[k.pack(narrow, narrow)]);
        k.cvt_rn_x2_to(packed, half, x, y);
        keep(k, out, &k.unpack(half, packed).map(Reg::cast));
        keep(k, out, &[k.fma_x2(half, packed, packed, packed)]);
        keep(k, out, &[packed, k.cvt_rn_x2(half, x, y), k.widen(half, narrow).cast()]);
    }
    k.finish()
}

fn control() -> Source {
    let k = &Kernel::new("control", Target::Sm80, 256);
    k.blocks_per_sm(2);
    let (out, n) = (k.pointer("out"), k.param::<u32>("n"));
    let [thread, x, y, z] = [k.thread(), k.block_x(), k.block_y(), k.block_z()];
    let sum = k.var(thread + x + y + z + k.blocks_x() + k.lane());
    k.when(n.gt(4), || sum.increase(1));
    k.if_(n.gt(8), || sum.increase(2));
    k.if_else(n.gt(16), || sum.increase(3), || sum.increase(4));
    k.apart(n.lt(1000), || sum.increase(5));
    k.loop_(|exit| {
        exit.when(sum.gt(n));
        sum.increase(n);
    });
    k.for_(0, n, 2, |i| sum.increase(i));
    k.emit(format_args!("brev.b32 {sum}, {sum}"));
    k.bar_sync(1, 128);
    k.bar_sync(n.min(15), 128);
    k.bar_arrive(n.min(15), 512);
    k.sync_block();
    k.bar_warp_sync();
    keep(k, out, &[k.shfl_idx(sum, 0), k.shfl_idx(sum, n), k.shfl_bfly(sum, 16)]);
    keep(k, out, &[k.shfl_up(sum, 4), k.vote_ballot(sum.gt(n)).popc()]);
    k.finish()
}

fn memory() -> Source {
    let k = &Kernel::new("memory", Target::Sm80, 128);
    let (input, out, n) = (k.pointer("in"), k.pointer("out"), k.param::<u32>("n"));
    let base = k.shared(4096);
    let slot = base + k.thread() * 16;
    let [one] = k.ld_global::<u32, 1>(input.element(n, 4));
    let two = k.ld_global::<u32, 2>(input.at(16));
    let four = k.ld_global_nc::<u32, 4>(input);
    let [half] = k.ld_global_nc::<u16, 1>(input.at(-2));
    k.when(one.gt(3), || k.ld_global_nc_to(one, input.at(8)));
    let byte = k.ld_global_nc_u8(input.at(3)) + k.ld_global_u8(input.at(4));
    keep(k, out, &[k.ld_shared_u8(slot.at(5)), k.ld_shared_u16(slot.at(6))]);
    k.st_shared(slot, four);
    k.st_shared(slot.at(4), [one]);
    let back = k.ld_shared::<u32, 4>(slot);
    let [wide] = k.ld_shared::<u64, 1>(slot.at(8));
    k.st_global(out, back);
    k.st_global(out.at(16), two);
    k.st_global(out.at(24), [wide]);
    k.st_global(out.at(32).at(4), [half]);
    k.st_global(out.at(40), [byte]);
    k.finish()
}

fn ampere() -> Source {
    let k = &Kernel::new("ampere", Target::Sm80, 32);
    let (input, out, bytes) = (k.pointer("in"), k.pointer("out"), k.param::<u32>("bytes"));
    let base = k.shared(2048);
    let line = base + k.lane() * 16;
    k.cp_async(line, input, 16);
    k.cp_async(line.at(512), input.at(512), bytes);
    k.cp_async_line(line.at(528), input.at(528), bytes);
    k.cp_async_4(line.at(1024), input.at(4), bytes);
    k.cp_async_commit();
    k.cp_async_wait(1);
    k.cp_async_wait(0);
    k.bar_warp_sync();
    let a = k.ldmatrix(line, false);
    let [b, c, ..] = k.ldmatrix(line.at(512), true);
    k.ldmatrix_to(a, line.at(512), false);
    for half in [Half::F16, Half::Bf16] {
        let sum = std::array::from_fn(|_| k.var(0f32));
        k.mma(half, sum, Mma { a, b: [b, c] });
        keep(k, out, &sum.map(Reg::cast));
    }
    let sum = std::array::from_fn(|_| k.var(0f32));
    let exact: [Reg<i32>; 4] = k.regs();
    k.mma(Factor::S8, exact, Mma { a, b: [b, c] });
    keep(k, out, &exact.map(Reg::cast));
    k.mma_tf32(sum, Mma { a, b: [b, c] });
    keep(k, out, &sum.map(Reg::cast));
    k.finish()
}

/// Two warpgroups: TMA's, and one that multiplies 64×16.
fn hopper() -> Source {
    let k = &Kernel::new("hopper", Target::Sm90a, 256);
    k.blocks_per_sm(1);
    k.cluster(2);
    let (map, result) = (k.tensor_map("map"), k.tensor_map("result"));
    let (out, n) = (k.pointer("out"), k.param::<u32>("n"));
    let base = k.shared(32 * 1024);
    let (full, empty, tile) = (base, base + 8, base + 1024);
    let group = k.shfl_idx(k.thread() / 128, 0);
    k.if_(k.thread().eq(0), || {
        k.prefetch_tensor_map(map);
        k.mbarrier_init(full, 1);
        k.mbarrier_init(empty, 2);
        k.fence_mbarrier_init();
    });
    k.sync_cluster();
    k.griddepcontrol_wait();
    k.griddepcontrol_launch_dependents();
    let place = k.cluster_rank() + k.cluster_x() * k.clusters_x();
    k.if_else(
        group.eq(0),
        || {
            k.setmaxnreg_dec(40);
            k.if_(k.elect_sync(), || {
                k.mbarrier_arrive_expect_tx(full, 3 * 8192);
                let both = Delivery::Multicast(k.var(0b11u16));
                k.tma_load(tile, map, &[place, n], full, Delivery::Plain);
                k.tma_load(tile.at(8192), map, &[place, n, n], full, Delivery::Once);
                k.tma_load(tile.at(16_384), map, &[place, n, n, n], full, both);
                k.mbarrier_arrive_expect_tx(empty, n);
                k.bulk_load(tile, out, 2048, full, Delivery::Once);
                k.bulk_load(tile.at(2048), out.at(16), n, full, Delivery::Plain);
            });
        },
        || {
            k.setmaxnreg_inc(232);
            k.mbarrier_wait(full, k.var(0));
            let sum: Vec<_> = (0..8).map(|_| k.reg::<f32>()).collect();
            let descriptor = tile.bfe(4, 14).with_high(0x4000_0040);
            let operand = |transposed| Operand { descriptor, transposed };
            let [x, y] = [k.var(1f32), k.var(2f32)];
            let pair = k.cvt_e4m3x2(x, y);
            keep(k, out, &[k.pack(pair, pair)]);
            let [codes, _] = k.halves(k.cvt_f16x2_e4m3x2(pair));
            keep(k, out, &[k.pack(codes, codes)]);
            k.wgmma_fence();
            for (half, accumulate) in [(Half::Bf16, false.into()), (Half::Bf16, n.ne(0).into())] {
                k.wgmma(
                    &sum,
                    Wgmma { factor: half.into(), a: operand(false), b: operand(true), accumulate },
                );
            }
            let (a, b) = ([n, place, n, place], operand(true));
            k.wgmma_regs(
                &sum,
                WgmmaRegs { factor: Half::F16.into(), a, b, accumulate: true.into() },
            );
            let exact: Vec<_> = (0..8).map(|_| k.reg::<i32>()).collect();
            let (byte, accumulate) = (operand(false), true.into());
            let of_bytes = |factor| Wgmma { factor, a: byte, b: byte, accumulate };
            k.wgmma(&exact, of_bytes(Factor::S8));
            k.wgmma(&sum, of_bytes(Factor::E4m3));
            k.wgmma_commit();
            k.wgmma_wait(1);
            k.wgmma_wait(0);
            let packed =
                std::array::from_fn(|i| k.cvt_rn_x2(Half::Bf16, sum[2 * i], sum[2 * i + 1]));
            k.stmatrix(tile + k.lane() * 16, packed, false);
            k.stmatrix(tile + k.lane() * 16, packed, true);
            k.fence_proxy_async();
            k.when(k.lane().eq(0), || {
                k.tma_store(result, &[place, n], tile);
                k.tma_reduce_add(result, &[place, n], tile);
                k.tma_commit();
                k.tma_wait_read(0);
                k.bulk_reduce_add(out, tile, 256);
                k.tma_commit();
                k.tma_wait(0);
                k.red_release_add(out);
                k.red_add(out.at(128), k.var(1f32));
                k.red_max(out.at(132), k.thread());
                k.st_global_u8(out.at(136), k.thread());
            });
            keep(k, out, &[k.ld_acquire(out.at(64)), k.atom_add(out.at(64))]);
            k.mbarrier_arrive(empty);
            let other = k.mapa(base, 1);
            k.mbarrier_arrive_cluster(other.at(8));
            keep(k, out, &k.ld_cluster::<u32, 4>(other.at(1024)));
            k.st_async(other.at(1040), [k.var(1f32); 4], other.at(8));
        },
    );
    k.sync_cluster();
    k.arrive_cluster();
    k.wait_cluster();
    k.finish()
}

/// Whoever adds a method adds a line above.
#[test]
fn every_method_is_used() {
    const SOURCES: [&str; 10] = [
        include_str!("../../src/ptx/control.rs"),
        include_str!("../../src/ptx/copy.rs"),
        include_str!("../../src/ptx/mbarrier.rs"),
        include_str!("../../src/ptx/memory.rs"),
        include_str!("../../src/ptx/mma.rs"),
        include_str!("../../src/ptx/mod.rs"),
        include_str!("../../src/ptx/pairs.rs"),
        include_str!("../../src/ptx/reg.rs"),
        include_str!("../../src/ptx/sync.rs"),
        include_str!("../../src/ptx/tma.rs"),
    ];
    // What emits nothing, or is used by other methods alone.
    const QUIET: [&str; 5] = ["name", "target", "kernel", "regs", "needs"];
    let name = |text: &'static str| {
        let end = text.find(|c: char| c != '_' && !c.is_alphanumeric()).unwrap_or(text.len());
        &text[..end]
    };
    let called: HashSet<_> = include_str!("instructions.rs").split(['.', ':']).map(name).collect();
    let methods = SOURCES.iter().flat_map(|source| source.split("pub fn ").skip(1)).map(name);
    let mut count = 0;
    // The macro of the comparisons has no name there.
    for method in methods.filter(|method| !method.is_empty() && !QUIET.contains(method)) {
        assert!(called.contains(method), "no kernel here uses {method}");
        count += 1;
    }
    assert!(count > 80, "{count} methods were found");
}
