"""safetensors' reader or, where it is not installed, one for the few types that cases have."""

try:
    from safetensors.torch import load_file
except ImportError:
    import json
    import struct

    import torch

    TYPES = {"F32": torch.float32, "I64": torch.int64, "U32": torch.uint32}

    def load_file(path, device="cpu"):
        data = bytearray(open(path, "rb").read())
        (length,) = struct.unpack_from("<Q", data)
        tensors = {}
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                count = (end - start) // TYPES[entry["dtype"]].itemsize
                flat = torch.frombuffer(data, dtype=TYPES[entry["dtype"]], count=count, offset=8 + length + start)
                tensors[name] = flat.reshape(entry["shape"]).to(device)
        return tensors


__all__ = ["load_file"]
