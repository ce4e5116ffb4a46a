"""What conditions a denoiser: one file per kind, each turns a batch into a Cond."""
