"""What the root file system of every node consists of.

Pure data: the cache key of the base layer is the hash of this file, so anything that changes the result belongs here.
"""

SUITE = "trixie"

# CRIU older than 4.2 fails on every TCP socket with kernels >= 6.16; these come from unstable, the rest from SUITE.
NEWER_SUITE = "sid"
FROM_NEWER_SUITE = (
    "criu",
    "libcompel1",
    "libnet9",
    "libnl-3-200",
    "libnl-3-dev",
    "libnl-genl-3-200",
    "libnl-route-3-200",
    "libnl-route-3-dev",
    "python3-pycriu",
)

PACKAGES = (
    # checkpointing
    "criu",
    "python3-pycriu",
    "python3-protobuf",
    "libnl-3-dev",
    "libnl-route-3-dev",
    # the cluster
    "slurm-wlm",
    "slurmctld",
    "slurmd",
    "slurm-client",
    "libslurm-dev",
    "munge",
    # MPI and programs that use it
    "mpich",
    "libmpich-dev",
    "openmpi-bin",
    "libopenmpi-dev",
    "lammps",
    "hpcc",
    # Python
    "python3",
    "python3-venv",
    "python3-dev",
    "python3-pip",
    "python3-numpy",
    "python3-mpi4py",
    # building
    "gcc",
    "g++",
    "make",
    "libc6-dev",
    "pkg-config",
    "git",
    # networking
    "nftables",
    "iproute2",
    "iputils-ping",
    "netcat-openbsd",
    "curl",
    "ca-certificates",
    # looking at things
    "procps",
    "util-linux",
    "strace",
    "gdb-minimal",
    "lsof",
    "psmisc",
    "less",
    "screen",
    "tmux",
    # files
    "tar",
    "xz-utils",
    "zstd",
    "rsync",
)

# Documentation is half of the size and nobody reads it inside a node.
DPKG_OPTIONS = (
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
)

USERS = {"user1": 1001, "user2": 1002}

# Run by sh inside the finished base layer.
CUSTOMIZE = "\n".join(
    [
        "set -eu",
        *(f"groupadd -g {uid} {name}" for name, uid in USERS.items()),
        *(f"useradd -M -d /shared/home/{name} -s /bin/bash -u {uid} -g {uid} {name}" for name, uid in USERS.items()),
        "update-alternatives --set mpirun /usr/bin/mpirun.openmpi",
        # One key for everybody would join clusters that must not meet: each cluster makes its own.
        "rm -f /etc/munge/munge.key /etc/machine-id /etc/resolv.conf /etc/hostname",
        "mkdir -p /src /shared /etc/hpccr /etc/slurm/plugstack.conf.d",
        "touch /etc/resolv.conf /etc/hostname /etc/machine-id",
        "rm -rf /var/lib/apt/lists /var/cache/apt /var/log/apt /tmp/* /run/*",
    ]
)
