import pytest
from tiny_stage import loader, trainer

from ldm.nets.autoencoder import KLAutoencoder
from ldm.stages.autoencoder import Autoencoder


@pytest.mark.parametrize("known", [True, False])
def test_the_scale_of_latents_stays_with_the_encoder_that_made_them(tmp_path, known):
    """Whatever is validated on; but without a scale nothing could be encoded, so then it is measured."""
    net = KLAutoencoder(latent_channels=3, block_out_channels=(8, 8), layers_per_block=1, norm_groups=4)
    stage = Autoencoder(net, frozen=["encoder"])
    if known:
        stage.latent_mean.fill_(0.5)
        stage.latent_std.fill_(2.0)
    run = trainer(tmp_path, max_steps=2, val_check_interval=2, limit_val_batches=2)
    run.fit(stage, loader(16, size=8), loader(8, size=8))
    is_kept = stage.latent_mean.eq(0.5).all() and stage.latent_std.eq(2.0).all()
    assert bool(is_kept) == known and stage.latent_std.isfinite().all()
    checkpoint = {}
    stage.on_save_checkpoint(checkpoint)
    assert checkpoint["latent"]["measured_at"] == 2
