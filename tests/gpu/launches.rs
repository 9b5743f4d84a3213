//! Launches of one's own.
#![allow(unsafe_code)] // Kernels that are launched.

use candle_core::{CudaDevice, Device, Result};
use kaio_candle::launch::{Args, Function};
use kaio_candle::ptx::{Kernel, Source, Target};

use super::{custom_kernel, gpu};

/// The example is compared with candle's ops.
#[test]
fn example_of_a_custom_kernel() -> Result<()> {
    gpu().map_or(Ok(()), |_| custom_kernel::main())
}

fn cuda(device: &Device) -> &CudaDevice {
    device.as_cuda_device().expect("a GPU")
}

/// A kernel that does nothing with a pointer and a number.
fn idle(entry: &'static str, target: Target, cluster: u32) -> Source {
    let k = Kernel::new(entry, target, 32);
    k.cluster(cluster);
    k.pointer("at");
    k.param::<u32>("len");
    k.finish()
}

#[test]
fn wrong_launches() {
    let Some(gpu) = gpu() else { return };
    let device = cuda(&gpu);
    let function = Function::compile(device, &idle("idle", Target::Sm80, 1)).unwrap();
    let launch = |function: &Function, grid, args: &Args| {
        // SAFETY: the kernel touches no memory.
        unsafe { function.launch(device, grid, args) }.map_err(|e| e.to_string())
    };
    let mut args = Args::new();
    args.pointer(0).value(7u32);
    assert_eq!(launch(&function, [3, 2, 1], &args), Ok(()));
    assert_eq!(launch(&function, [0, 2, 1], &args), Ok(()), "no blocks are nothing to do");
    assert_eq!(
        launch(&function, [1, 1, 1], Args::new().pointer(0).value(7u64)).unwrap_err(),
        "Function::launch: `args` is 8, 8 bytes, wanted 8, 4 bytes, the parameters of `idle`; pass \
         the parameters in their order and types"
    );
    assert_eq!(
        launch(&function, [1, 65_536, 1], &args).unwrap_err(),
        "Function::launch: `grid` is [1, 65536, 1], wanted at most 2147483647 x 65535 x 65535 \
         blocks; let each block do more"
    );
    let mut many = Args::new();
    for i in 0..65u32 {
        many.value(i);
    }
    let text = launch(&function, [1, 1, 1], &many).unwrap_err();
    assert!(text.contains("`args` is more than 64 arguments or 4096 bytes"), "{text}");

    let hopper = idle("hopper", Target::Sm90a, 2);
    match Function::compile(device, &hopper) {
        Ok(pairs) => {
            assert_eq!(launch(&pairs, [4, 1, 1], &args), Ok(()));
            assert_eq!(
                launch(&pairs, [3, 1, 1], &args).unwrap_err(),
                "Function::launch: `grid` is [3, 1, 1], wanted a multiple of the 2 blocks of a \
                 cluster in x; round it up"
            );
        }
        Err(e) => {
            let text = e.to_string();
            assert!(text.contains("for sm_90a cannot run on a GPU of compute"), "{text}");
        }
    }
    gpu.synchronize().unwrap();
}

#[test]
fn kernels_that_do_not_compile() {
    let Some(gpu) = gpu() else { return };
    let refusal = |source: &Source| {
        let compile = || Function::compile(cuda(&gpu), source).unwrap_err().to_string();
        let text = compile();
        assert_eq!(compile(), text, "a failure leaves no trace");
        text
    };
    let broken = || {
        let k = Kernel::new("broken", Target::Sm80, 32);
        k.emit(format_args!("add.u32 %r0, %r1"));
        k.finish()
    };
    let text = refusal(&broken());
    assert!(text.starts_with("Function::compile: the GPU call failed: CUDA_ERROR_"), "{text}");
    assert!(text.contains(" for the kernel `broken`: "), "the assembler's words: {text}");

    let mut zero = broken();
    zero.text.push('\0');
    assert_eq!(
        refusal(&zero),
        "Function::compile: the GPU call failed: the text of `broken` has a zero byte"
    );
    let large = Kernel::new("large", Target::Sm80, 32);
    large.shared(1 << 30);
    let text = refusal(&large.finish());
    assert!(
        text.starts_with(
            "Function::compile: the kernel `large` cannot have 1073741824 bytes of shared memory a \
             block on this GPU (at most "
        ),
        "{text}"
    );
    // The context is as good as before.
    Function::compile(cuda(&gpu), &idle("after", Target::Sm80, 1)).unwrap();
}
