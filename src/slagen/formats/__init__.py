"""Weight files of every public form, as they are on disk: no diffusers and no pipeline here."""
