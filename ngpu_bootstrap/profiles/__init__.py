"""Families of calls that other systems' clients make, declared instead of written: the profiles.

A profile says, in TOML, which paths it answers, where the credential sits, which workspace a call goes to and how its
answer and its errors look. `declaration` is the form, `catalogue` the ones in use; `credentials`, `model_of_body`,
`form_bodies` and `dialects` know how bodies and answers are read and written. All of it is pure but for the reading
of files at the start; `front.profiled` carries the calls.
"""
