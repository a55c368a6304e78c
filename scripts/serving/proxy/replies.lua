-- Marks the one 500 that says nothing about its request: TorchServe's "Worker died.", so that it alone is sent again. Says when to
-- ask again where TorchServe's queue is full. Where there are several servers, waits for the whole of a reply, so that another one
-- can be asked if this one ends or stops in the middle of it.
-- `configuration.py` writes constants in front of this file: RETRY_AFTER_S, WHOLE_REPLY_BYTES.

local MAX_BYTES = 500 -- of TorchServe's own errors; others are not looked at

function envoy_on_response(handle)
  local headers = handle:headers()
  if headers:get(":status") == "503" and not headers:get("retry-after") then
    headers:add("retry-after", tostring(RETRY_AFTER_S))
  end
  local length = tonumber(headers:get("content-length"))
  if length and length <= WHOLE_REPLY_BYTES then
    handle:body()
  end
  if headers:get(":status") ~= "500" or not length or length > MAX_BYTES then
    return
  end
  local body = handle:body()
  if body and body:getBytes(0, body:length()):find('"message": "Worker died."', 1, true) then
    handle:headers():replace("x-worker-died", "true")
  end
end
