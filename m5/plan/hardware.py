"""Known machines: figures of their makers, per rank, in GB (10^9 bytes) and GB/s of one direction.

Sources, by document name:
    h100     NVIDIA H100 Tensor Core GPU datasheet (SXM: 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways, PCIe Gen5
             128 GB/s both ways) in a DGX H100 (2 TB host memory, one 400 Gb/s port a GPU; DGX H100 datasheet)
    h200     NVIDIA H200 Tensor Core GPU datasheet (SXM: 141 GB, 4.8 TB/s, NVLink 900 GB/s both ways) in a DGX H200
             (2 TB host memory, one 400 Gb/s port a GPU; DGX H200 datasheet)
    a100     NVIDIA A100 Tensor Core GPU datasheet (SXM, 80 GB: 2,039 GB/s, NVLink 600 GB/s both ways, PCIe Gen4
             64 GB/s both ways) in a DGX A100 640GB (2 TB host memory, one 200 Gb/s port a GPU)
    l40s     NVIDIA L40S datasheet (48 GB, 864 GB/s, PCIe Gen4 64 GB/s both ways, no NVLink). Host memory and network
             (100 Gb/s a GPU) are no figures of its maker but an assumption: servers differ.
    cpu      an assumption: 24 GB, eight channels of DDR4-3200 (204.8 GB/s) shared by the ranks, 10 Gb/s network

Host bandwidths are round assumptions; on GPUs, whose tables lie in device memory, nothing that is printed depends on
them.

What a device's memory holds is taken as its nominal size; the ECC and driver share is part of what `usable` leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Hardware:
    """One kind of machine.

    Attributes:
        device: what computes and holds the tables.
        device_memory: GB of one device; 0 on a CPU, whose ranks share the node's memory.
        device_bandwidth: GB/s between a device and its memory; 0 on a CPU.
        host_memory: GB of a node.
        host_bandwidth: GB/s between a node's processors and their memory.
        device_to_host: GB/s between a device and the host; 0 on a CPU.
        intra_node: GB/s that one rank sends to others of its node.
        inter_node: GB/s that one rank sends to other nodes.
        allowance: GB a rank that the framework takes for itself (see `Cluster.allowance`).
    """

    device: Literal["cuda", "cpu"]
    device_memory: float
    device_bandwidth: float
    host_memory: float
    host_bandwidth: float
    device_to_host: float
    intra_node: float
    inter_node: float
    allowance: float


# An allowance of 2 GB on a GPU stands for CUDA's context, cuBLAS's workspaces, NCCL's buffers and the allocator's
# fragments; it is an assumption, not a measurement. On a CPU it is what a process holds that has imported torch,
# torchrec and fbgemm, opened a gloo group and taken a few steps with tiny tables, measured (docs/results has the page).
HARDWARE = {
    "h100": Hardware("cuda", 80, 3350, 2000, 300, 64, 450, 50, 2.0),
    "h200": Hardware("cuda", 141, 4800, 2000, 300, 64, 450, 50, 2.0),
    "a100": Hardware("cuda", 80, 2039, 2000, 200, 32, 300, 25, 2.0),
    "l40s": Hardware("cuda", 48, 864, 512, 200, 32, 32, 12.5, 2.0),
    "cpu": Hardware("cpu", 0, 0, 24, 204.8, 0, 20, 1.25, 0.5),
}
