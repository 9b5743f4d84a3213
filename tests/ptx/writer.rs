//! What the writer writes.

use std::panic::{AssertUnwindSafe, catch_unwind};

use kaio_candle::ptx::{Kernel, ParamKind, Reg, Source, TENSOR_MAP_BYTES, Target};

fn sm80(write: impl FnOnce(&Kernel)) -> Source {
    let k = Kernel::new("test", Target::Sm80, 64);
    write(&k);
    k.finish()
}

/// The instructions of a body, without those of its parameters.
fn lines(write: impl FnOnce(&Kernel)) -> Vec<String> {
    let text = sm80(write).text;
    let body = text.split_once("{\n").and_then(|(_, body)| body.rsplit_once("  ret;\n}"));
    let lines = body.expect("a kernel has a body").0.lines().map(str::trim);
    let hidden = [".reg", "ld.param", "//"];
    lines.filter(|line| !hidden.iter().any(|h| line.starts_with(h))).map(String::from).collect()
}

/// A kernel's text is all of it.
#[test]
fn module() {
    let k = &Kernel::new("twice", Target::Sm80, 128);
    k.blocks_per_sm(3);
    let x = k.param::<f32>("x");
    k.note("a sum");
    let _ = x + x;
    let expected = "\
.version 7.0
.target sm_80
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry twice(.param .f32 x)
.reqntid 128, 1, 1
.minnctapersm 3
{
  .reg .f32 %f<2>;
  ld.param.f32 %f0, [x];
  // a sum
  add.f32 %f1, %f0, %f0;
  ret;
}
";
    assert_eq!(k.finish().text, expected);
}

#[test]
fn version_is_the_lowest_that_has_the_instructions() {
    type Write = fn(&Kernel);
    let version = |target, write: Write| {
        let k = Kernel::new("test", target, 128);
        write(&k);
        k.finish().text.lines().next().expect("a kernel has a text").to_string()
    };
    let cases: [(&str, Write); 9] = [
        ("7.0", |_| ()),
        ("7.0", |k| k.cp_async_commit()),
        ("7.0", |k| k.cluster(1)),
        ("7.8", |k| k.cluster(2)),
        ("7.8", |k| k.griddepcontrol_wait()),
        ("7.8", |k| k.mbarrier_arrive(k.shared(8))),
        ("8.0", |k| k.fence_proxy_async()),
        ("8.0", |k| {
            k.tma_commit();
            k.sync_cluster();
        }),
        ("8.3", |k| {
            k.needs(8, 3);
            k.needs(7, 9);
        }),
    ];
    for (i, (expected, write)) in cases.into_iter().enumerate() {
        assert_eq!(version(Target::Sm80, write), format!(".version {expected}"), "case {i}");
    }
    assert_eq!(version(Target::Sm90a, |_| ()), ".version 8.0");
}

/// As many of each kind as are used; none of a kind that is not.
#[test]
fn registers_are_declared() {
    let text = sm80(|k| {
        let _: [Reg<f32>; 5] = k.regs();
        let _: [Reg<i32>; 2] = k.regs();
        let (a, long, half) = (k.reg::<u32>(), k.reg::<u64>(), k.reg::<u16>());
        let _ = (a.eq(0), long, half);
    })
    .text;
    let declared: Vec<_> = text.lines().filter(|line| line.contains(".reg ")).collect();
    let expected = [
        "  .reg .pred %p<1>;",
        "  .reg .b16 %h<1>;",
        "  .reg .b32 %r<3>;",
        "  .reg .b64 %d<1>;",
        "  .reg .f32 %f<5>;",
    ];
    assert_eq!(declared, expected);
    assert!(!sm80(|_| ()).text.contains(".reg "));
}

#[test]
fn immediates() {
    let written = lines(|k| {
        k.var(1f32);
        k.var(-0f32);
        k.var(f32::INFINITY);
        k.var(-7);
        k.var(u32::MAX);
        k.var(u64::MAX);
        k.var(9u16);
        k.var(true);
    });
    let expected = [
        "mov.f32 %f0, 0f3F800000;",
        "mov.f32 %f1, 0f80000000;",
        "mov.f32 %f2, 0f7F800000;",
        "mov.s32 %r0, -7;",
        "mov.u32 %r1, 4294967295;",
        "mov.u64 %d0, 18446744073709551615;",
        "mov.u16 %h0, 9;",
        "mov.pred %p0, 1;",
    ];
    assert_eq!(written, expected);
}

#[test]
fn unsigned_powers_of_two_are_shifts_and_masks() {
    let written = lines(|k| {
        let (a, b, one) = (k.reg::<u32>(), k.reg::<u64>(), 1);
        let _ = (a / 1, a / 8, a % one, a % 8, b / 4096u64, b % 4096u64);
    });
    let expected = [
        "mov.u32 %r1, %r0;",
        "shr.u32 %r2, %r0, 3;",
        "and.b32 %r3, %r0, 0;",
        "and.b32 %r4, %r0, 7;",
        "shr.u64 %d1, %d0, 12;",
        "and.b64 %d2, %d0, 4095;",
    ];
    assert_eq!(written, expected);
}

/// Other numbers, registers, and signed operands, where a shift would round towards −∞.
#[test]
fn other_divisions_divide() {
    let written = lines(|k| {
        let (a, s, x) = (k.reg::<u32>(), k.reg::<i32>(), k.reg::<f32>());
        let _ = (a / 10, a % 10, a / a, s / 8, s % 8, x / 2.0);
    });
    let expected = [
        "div.u32 %r2, %r0, 10;",
        "rem.u32 %r3, %r0, 10;",
        "div.u32 %r4, %r0, %r0;",
        "div.s32 %r5, %r1, 8;",
        "rem.s32 %r6, %r1, 8;",
        "div.rn.f32 %f1, %f0, 0f40000000;",
    ];
    assert_eq!(written, expected);
}

#[test]
fn parameters() {
    let source = sm80(|k| {
        k.tensor_map("map");
        k.pointer("address");
        k.param::<u32>("count");
        k.param::<u64>("stride");
        k.param::<f32>("scale");
    });
    let params: Vec<_> = source.params.iter().map(|p| (p.name.as_str(), p.kind)).collect();
    let expected = [
        ("map", ParamKind::TensorMap),
        ("address", ParamKind::Pointer),
        ("count", ParamKind::value::<u32>()),
        ("stride", ParamKind::value::<u64>()),
        ("scale", ParamKind::value::<f32>()),
    ];
    assert_eq!(params, expected);
    let sizes: Vec<_> = source.params.iter().map(|param| param.kind.size()).collect();
    assert_eq!(sizes, [TENSOR_MAP_BYTES, 8, 4, 8, 4]);
    let list = ".param .align 64 .b8 map[128], .param .b64 address, .param .b32 count, \
                .param .b64 stride, .param .f32 scale";
    assert!(source.text.contains(&format!(".entry test({list})")), "{}", source.text);
    assert!(sm80(|_| ()).text.contains(".entry test()"));
}

/// What a launch must match, and what the text says of it.
#[test]
fn facts_of_a_launch() {
    let k = &Kernel::new("test", Target::Sm90a, 384);
    k.shared(1000);
    k.cluster(2);
    k.griddepcontrol_wait();
    let source = k.finish();
    assert_eq!((source.entry, source.target, source.threads), ("test", Target::Sm90a, 384));
    assert_eq!((source.shared, source.cluster, source.starts_early), (1000, 2, true));
    assert!(source.text.contains(".explicitcluster\n.reqnctapercluster 2, 1, 1\n"));
    let plain = sm80(|_| ());
    assert_eq!((plain.shared, plain.cluster, plain.starts_early), (0, 1, false));
    assert!(!plain.text.contains("cluster") && !plain.text.contains("minnctapersm"));
}

#[test]
fn addresses() {
    let written = lines(|k| {
        let (global, shared) = (k.reg::<u64>(), k.reg::<u32>());
        let [x] = k.ld_global::<f32, 1>(global);
        let [y, z] = k.ld_shared::<f32, 2>(shared.at(16).at(-32));
        k.st_global(global.at(8), [x, y, z, x]);
    });
    let expected = [
        "ld.global.f32 %f0, [%d0];",
        "ld.shared.v2.f32 {%f1, %f2}, [%r0+-16];",
        "st.global.v4.f32 [%d0+8], {%f0, %f1, %f2, %f0};",
    ];
    assert_eq!(written, expected);
}

/// Bits move only between kinds of registers.
#[test]
fn casts() {
    let written = lines(|k| {
        let x = k.reg::<f32>();
        x.cast::<u32>().cast::<i32>().cast::<f32>();
    });
    assert_eq!(written, ["mov.b32 %r0, %f0;", "mov.b32 %f1, %r0;"]);
    assert!(catch_unwind(|| lines(|k| _ = k.reg::<u64>().cast::<u32>())).is_err());
}

#[test]
fn predication() {
    let written = lines(|k| {
        let (p, a) = (k.reg::<bool>(), k.reg::<u32>());
        k.when(p, || {
            a.set(1);
            k.sync_block();
        });
        k.if_(!p, || a.set(2));
    });
    let expected = [
        "@%p0 mov.u32 %r0, 1;",
        "@%p0 bar.sync 0;",
        "not.pred %p1, %p0;",
        "@!%p1 bra L1;",
        "mov.u32 %r0, 2;",
        "L1:",
    ];
    assert_eq!(written, expected);
}

/// A predicate holds for instructions, not for jumps.
#[test]
fn no_control_flow_within_when() {
    type Body = fn(&Kernel, Reg<bool>);
    let bodies: [Body; 4] = [
        |k, p| k.when(p, || ()),
        |k, p| k.if_(p, || ()),
        |k, p| k.loop_(|exit| exit.when(p)),
        |k, p| k.if_else(p, || (), || ()),
    ];
    for (i, body) in bodies.into_iter().enumerate() {
        let write = AssertUnwindSafe(|| {
            lines(|k| {
                let p = k.reg();
                k.when(p, || body(k, p));
            })
        });
        assert!(catch_unwind(write).is_err(), "body {i}");
    }
}

#[test]
fn branches() {
    let written = lines(|k| {
        let (p, a) = (k.reg::<bool>(), k.reg::<u32>());
        k.if_else(p, || a.set(1), || a.set(2));
    });
    let expected = ["@!%p0 bra L1;", "mov.u32 %r0, 1;", "bra L2;", "L1:", "mov.u32 %r0, 2;", "L2:"];
    assert_eq!(written, expected);
}

#[test]
fn loops() {
    let written = lines(|k| {
        let n = k.reg::<u32>();
        k.for_(1, n, 2, |_| k.bar_warp_sync());
    });
    let expected = [
        "mov.u32 %r1, 1;",
        "L1:",
        ".pragma \"nounroll\";",
        "setp.ge.u32 %p0, %r1, %r0;",
        "@%p0 bra L2;",
        "bar.warp.sync -1;",
        "add.u32 %r1, %r1, 2;",
        "bra L1;",
        "L2:",
    ];
    assert_eq!(written, expected);
}
