// What the loops over rows need beside the prelude.
#pragma once
namespace mp {
// Points per chunk of a row range: at least `least`, at most 64 chunks, a multiple of `multiple`.
MP_INLINE int64_t chunk_length(int64_t size, int64_t least, int64_t multiple) {
    int64_t wanted = (size + 63) / 64;
    wanted = wanted < least ? least : wanted;
    return (wanted + multiple - 1) / multiple * multiple;
}
}  // namespace mp
