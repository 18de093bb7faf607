"""The GPUs of this machine: which there are, whether they are well, and how busy a workspace kept them.

Where to look:

    driver.py      what the rest asks of the NVIDIA driver: readings, faults, the seam tests replace
    nvml.py        that seam over NVML, in a session of nvml_session.py; only these two import pynvml
    calls.py       driver calls off the event loop, one at a time, each with a time limit
    inventory.py   what a survey of the driver comes to: devices offered, withheld, refused, and why
    choice.py      which of the usable devices a workspace gets
    health.py      from vitals and events to the conditions of each device, and when it may serve again
    xids.py        what the driver's error numbers mean for the health of a device
    samples.py     from the driver's utilisation samples to windows of measured time
    looks.py       one look: which calls it takes
    presence.py    who is on a device from look to look, and whose the work of ended processes is
    busy.py        from measured windows to what each task pays
    processes.py   which container a process belongs to
    containers.py  whether a container still has its devices
    machine.py     CPU, memory, disk, kernel, toolkit
    watch.py       the service that keeps all of it current while the node runs
    show.py        the same as a table and as JSON

Everything but `nvml`, `looks`, `processes`, `machine`, `calls` and `watch` is pure: readings and times in, decisions
out. A device is known by its UUID, never by its index, which changes when a card is lost.
"""
