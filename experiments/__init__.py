import vae_ppo  # noqa: F401  It sets OMP_WAIT_POLICY before torch is imported
