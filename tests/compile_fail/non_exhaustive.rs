use kaio_candle::{Engine, FlashAttnOptions, MatmulOptions};

fn main() {
    let _ = FlashAttnOptions { causal: true, softmax_scale: None, engine: Engine::Auto };
    let _ = MatmulOptions { out_dtype: None, ..Default::default() };
    match Engine::Auto {
        Engine::Auto | Engine::KaioOps | Engine::Native => {}
    }
}
