//! Attention by candle's ops over all scores at once: the yardstick.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::ops::softmax;

use super::options::Rules;

/// The formula in the dtype of its inputs. Rows that see no key are seen by all and then set to zero.
pub fn plain([q, k, v]: &[Tensor; 3], bias: Option<&Tensor>, rules: &Rules) -> Result<Tensor> {
    let matrices = |t: &Tensor| t.reshape(((), t.dim(D::Minus2)?, t.dim(D::Minus1)?));
    let (shape, q, k, v) = (q.dims(), matrices(q)?, matrices(k)?, matrices(v)?);
    let ((heads, sq, _), (kv_heads, sk, dv)) = (q.dims3()?, v.dims3()?);
    let repeat = |t: Tensor| {
        let (rows, cols) = (t.dim(1)?, t.dim(2)?);
        let wide = t.unsqueeze(1)?.broadcast_as((kv_heads, heads / kv_heads, rows, cols))?;
        wide.reshape((heads, rows, cols))
    };
    let all = (heads, sq, sk);
    let constant = |data: Vec<f64>, shape: (usize, usize, usize)| {
        Tensor::from_vec(data, shape, q.device())?.to_dtype(DType::F32)?.to_dtype(q.dtype())
    };
    let (mut mask, mut penalty, mut open) = (vec![], vec![], vec![]);
    for i in 0..heads * sq {
        let seen = rules.keys(i);
        let hidden = if seen.is_empty() { 0.0 } else { f64::NEG_INFINITY };
        let (mut masks, mut penalties) = (vec![hidden; sk], vec![0.0; sk]);
        for key in &seen {
            masks[key.j] = if key.bias == f64::NEG_INFINITY { key.bias } else { 0.0 };
            penalties[key.j] = key.penalty;
        }
        mask.extend(masks);
        penalty.extend(penalties);
        open.push(if seen.is_empty() { 0.0 } else { 1.0 });
    }
    let mut scores = (q.contiguous()?.matmul(&repeat(k)?.t()?.contiguous()?)? * rules.scale)?;
    if let Some(cap) = rules.softcap() {
        scores = ((scores / cap)?.tanh()? * cap)?;
    }
    if let Some(bias) = bias {
        // What hides a key is in the mask.
        let hides = bias.eq(f64::NEG_INFINITY)?;
        let bias = hides.where_cond(&bias.zeros_like()?, bias)?.to_dtype(q.dtype())?;
        let by_batch = scores.reshape(((), rules.heads_of_batch(), sq, sk))?;
        scores = by_batch.broadcast_add(&bias)?.reshape(all)?;
    }
    scores = ((scores - constant(penalty, all)?)? + constant(mask, all)?)?;
    let out = softmax(&scores, D::Minus1)?.matmul(&repeat(v)?)?;
    let out = out.broadcast_mul(&constant(open, (heads, sq, 1))?)?;
    out.reshape([&shape[..shape.len() - 1], &[dv]].concat())
}
