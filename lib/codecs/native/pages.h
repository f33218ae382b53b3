// Attention of one token of each of several requests to states that lie in pieces: full ones, or
// pages that are records (record.h), from whose codes it computes.
#pragma once

#include <cstdint>

#include "attention.h"
#include "record.h"

namespace tierhints {

// Scores that a span has room for: kSpan tokens, and the few that come before all pages.
constexpr int64_t kSpanScores = kSpan + 16;

// How the keys of a piece lie, or its values: by head and then by token, `size` numbers a row. Codes
// of keys lie the other way, a row for each of the numbers of a head: those of all its tokens.
struct StateRows {
  int bits;        // 32: float; 16: bfloat16; else codes
  int64_t size;    // a multiple of 16
  int64_t stride;  // numbers from row to row, where there are no codes
  Layout layout;   // of codes

  bool has_codes() const { return bits < 16; }
};

// Tokens whose states lie together.
struct Piece {
  const uint8_t *keys, *values;
  int64_t rows;           // a head, as many as there is room for
  int64_t hidden, count;  // the first of them, which aren't attended to, and all that there are
};

// Pieces of one request that a group of its queries, those of one head of keys, attends to.
struct PageSpan {
  const float* query;  // (rows, size of a key)
  int64_t rows;
  int64_t request, group;
  const StateRows *keys[2], *values[2];  // of full pieces; of pages
  const Piece *pieces, *end;
  const Piece *pages, *pages_end;  // which of all pieces are pages
  float scale, softcap;  // softcap 0: none

  bool is_page(const Piece* piece) const { return pages <= piece && piece < pages_end; }
};

// Floats that a thread works in.
inline int64_t page_floats(int64_t rows, int64_t piece_rows, int64_t size) {
  return rows * (kSpanScores + 16 + size) + round_up(piece_rows, kBlockCodes) *
                                                round_up(size, kBlockCodes);
}

}  // namespace tierhints
