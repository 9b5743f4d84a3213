//! cuBLASLt, the peer to beat: f32 sums, any layout, its own choice of algorithm or the fastest of
//! its eight first choices.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, DType, Error, Result, Storage, Tensor, bail};
use cudarc::cublaslt::{result, sys};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::common::gpu::Gpu;
use super::common::turns::median;

/// What cuBLAS itself takes on Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
const CHOICES: usize = 8;

/// A handle and its workspace.
pub struct Library {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    stream: Arc<CudaStream>,
}

impl Library {
    pub fn new(device: &CudaDevice) -> Result<Rc<Self>> {
        let stream = device.cuda_stream();
        let workspace = stream.alloc_zeros(WORKSPACE_BYTES).w()?;
        let handle = result::create_handle().map_err(Error::wrap)?;
        Ok(Rc::new(Self { handle, workspace, stream }))
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once. A failure while the bench ends is nobody's concern.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// `out = lhs · rhs`, into memory that exists.
///
/// cuBLASLt reads matrices by columns. What lies by rows is to it the transposed matrix, so it is
/// asked for `outᵀ = rhsᵀ · lhsᵀ`: its A is `rhs`, its B is `lhs`.
pub struct Product {
    library: Rc<Library>,
    desc: sys::cublasLtMatmulDesc_t,
    a: (sys::cublasLtMatrixLayout_t, u64),
    b: (sys::cublasLtMatrixLayout_t, u64),
    d: (sys::cublasLtMatrixLayout_t, u64),
    /// By cuBLASLt's estimate, the fastest first.
    choices: Vec<sys::cublasLtMatmulAlgo_t>,
    out: Tensor,
    /// Kept for their memory.
    _operands: [Tensor; 2],
}

impl Product {
    pub fn new(library: &Rc<Library>, lhs: &Tensor, rhs: &Tensor, out: DType) -> Result<Self> {
        let ((m, k), n) = (lhs.dims2()?, rhs.dim(1)?);
        let out = Tensor::zeros((m, n), out, lhs.device())?;
        let ((lhs_t, lhs_ld), (rhs_t, rhs_ld)) = (transposition(lhs)?, transposition(rhs)?);
        let f32 = sys::cudaDataType_t::CUDA_R_32F;
        let desc = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32)
            .map_err(Error::wrap)?;
        let layout = |t: &Tensor, rows: usize, cols: usize, ld: usize| -> Result<_> {
            let kind = data_type(t.dtype())?;
            let layout = result::create_matrix_layout(kind, rows as u64, cols as u64, ld as i64)
                .map_err(Error::wrap)?;
            Ok((layout, address(t)?))
        };
        let (rhs_rows, rhs_cols) = if rhs_t { (k, n) } else { (n, k) };
        let (lhs_rows, lhs_cols) = if lhs_t { (m, k) } else { (k, m) };
        let mut product = Self {
            library: library.clone(),
            desc,
            a: layout(rhs, rhs_rows, rhs_cols, rhs_ld)?,
            b: layout(lhs, lhs_rows, lhs_cols, lhs_ld)?,
            d: layout(&out, n, m, n)?,
            choices: Vec::new(),
            out,
            _operands: [lhs.clone(), rhs.clone()],
        };
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        product.transpose(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, rhs_t)?;
        product.transpose(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, lhs_t)?;
        product.choices = product.ask()?;
        Ok(product)
    }

    fn transpose(&self, which: sys::cublasLtMatmulDescAttributes_t, yes: bool) -> Result<()> {
        use cudarc::cublas::sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
        let operation = if yes { CUBLAS_OP_T } else { CUBLAS_OP_N };
        let (value, bytes) = ((&raw const operation).cast(), size_of_val(&operation));
        // SAFETY: the descriptor lives as long as `self`; the value is of the attribute's type.
        unsafe { result::set_matmul_desc_attribute(self.desc, which, value, bytes) }
            .map_err(Error::wrap)
    }

    fn ask(&self) -> Result<Vec<sys::cublasLtMatmulAlgo_t>> {
        use sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let preference = result::create_matmul_pref().map_err(Error::wrap)?;
        let (limit, mut count) = (WORKSPACE_BYTES, 0);
        let mut found = [sys::cublasLtMatmulHeuristicResult_t {
            algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspaceSize: 0,
            state: sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            wavesCount: 0.0,
            reserved: [0; 4],
        }; CHOICES];
        // SAFETY: all descriptors are alive; the array has room for as many results as are asked for.
        let answer = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const limit).cast(),
                size_of_val(&limit),
            )
            .and_then(|()| {
                sys::cublasLtMatmulAlgoGetHeuristic(
                    self.library.handle,
                    self.desc,
                    self.a.0,
                    self.b.0,
                    self.d.0,
                    self.d.0,
                    preference,
                    CHOICES as i32,
                    found.as_mut_ptr(),
                    &mut count,
                )
                .result()
            })
        };
        // SAFETY: made above, destroyed once.
        let destroyed = unsafe { result::destroy_matmul_pref(preference) };
        answer.and(destroyed).map_err(Error::wrap)?;
        let usable = found.iter().take(count as usize).filter(|r| r.state.result().is_ok());
        let choices: Vec<_> = usable.map(|r| r.algo).collect();
        if choices.is_empty() {
            bail!("cuBLASLt has no algorithm for this product");
        }
        Ok(choices)
    }

    pub fn choices(&self) -> usize {
        self.choices.len()
    }

    pub fn out(&self) -> &Tensor {
        &self.out
    }

    /// Enqueues the product with one of the choices.
    pub fn run(&self, choice: usize) -> Result<()> {
        let (alpha, beta) = (1f32, 0f32);
        let (workspace, _guard) = self.library.workspace.device_ptr(&self.library.stream);
        let pointer = |address: u64| address as *const c_void;
        // SAFETY: descriptors and device memory live as long as `self`, the layouts were made from
        // the tensors themselves, and the scalars are read before the call returns. One stream
        // orders this with all other uses of the memory.
        unsafe {
            result::matmul(
                self.library.handle,
                self.desc,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                pointer(self.a.1),
                self.a.0,
                pointer(self.b.1),
                self.b.0,
                pointer(self.d.1),
                self.d.0,
                pointer(self.d.1).cast_mut(),
                self.d.0,
                &self.choices[choice],
                pointer(workspace).cast_mut(),
                WORKSPACE_BYTES,
                self.library.stream.cu_stream().cast(),
            )
        }
        .map_err(Error::wrap)
    }

    /// The choice that was fastest here.
    pub fn fastest(&self, gpu: &mut Gpu, cold: bool) -> Result<usize> {
        const SAMPLES: usize = 5;
        let mut times = Vec::new();
        for choice in 0..self.choices() {
            let mut run = || self.run(choice);
            gpu.time(cold, &mut run)?;
            let samples = (0..SAMPLES).map(|_| gpu.time(cold, &mut run));
            times.push((choice, median(samples.collect::<Result<_>>()?)));
        }
        let fastest = times.into_iter().min_by(|(_, a), (_, b)| a.total_cmp(b));
        Ok(fastest.map_or(0, |(choice, _)| choice))
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        // SAFETY: all made in `new`, destroyed once. A failure while the bench goes on is nobody's
        // concern.
        unsafe {
            let _ = result::destroy_matmul_desc(self.desc);
            for (layout, _) in [self.a, self.b, self.d] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

/// Whether a matrix lies by columns, and how far its rows (or columns) are apart.
fn transposition(t: &Tensor) -> Result<(bool, usize)> {
    match *t.stride() {
        [ld, 1] => Ok((false, ld)),
        [1, ld] => Ok((true, ld)),
        _ => bail!("cuBLASLt takes no matrix of strides {:?}", t.stride()),
    }
}

fn data_type(dtype: DType) -> Result<sys::cudaDataType_t> {
    match dtype {
        DType::F16 => Ok(sys::cudaDataType_t::CUDA_R_16F),
        DType::BF16 => Ok(sys::cudaDataType_t::CUDA_R_16BF),
        DType::F32 => Ok(sys::cudaDataType_t::CUDA_R_32F),
        _ => bail!("no rows of {dtype:?}"),
    }
}

/// Where a tensor's first element is.
fn address(t: &Tensor) -> Result<u64> {
    let (storage, layout) = t.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("cuBLASLt takes CUDA tensors") };
    let stream = storage.device.cuda_stream();
    let (base, _guard) = match &storage.slice {
        CudaStorageSlice::F16(s) => s.device_ptr(&stream),
        CudaStorageSlice::BF16(s) => s.device_ptr(&stream),
        CudaStorageSlice::F32(s) => s.device_ptr(&stream),
        _ => bail!("no rows of {:?}", t.dtype()),
    };
    Ok(base + (layout.start_offset() * t.dtype().size_in_bytes()) as u64)
}
