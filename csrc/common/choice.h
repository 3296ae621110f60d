#pragma once
// What was chosen for a call, in words.

namespace gossamer {

struct Choice {
  const char* kernel;
  const char* target;
  const char* why;
};

}  // namespace gossamer
